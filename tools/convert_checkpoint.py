"""Convert training checkpoints for Hugging Face's transformers, or show what is in one."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.store import find_checkpoint
from megatron_bert.checkpoint.summary import describe_checkpoint
from megatron_bert.config.errors import run_cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_hf = commands.add_parser(
        "to-hf",
        help="write a directory for AutoModelForMaskedLM and AutoTokenizer",
        description="Write a directory that transformers loads with trust_remote_code=True: "
        "config.json, modeling code, model.safetensors, tokenizer.",
    )
    to_hf.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="a checkpoint (runs/NAME/checkpoints/step_00001234), or a run directory, whose "
        "newest intact one is taken",
    )
    to_hf.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="directory to make"
    )
    to_hf.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="type of the weights (default: %(default)s, as they were trained)",
    )
    to_hf.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="the tokenizer of the run, where it no longer lies where the run found it",
    )
    inspect = commands.add_parser(
        "inspect",
        help="print step, shape and content of a checkpoint",
        description="Print step, model, content and integrity of a checkpoint.",
    )
    inspect.add_argument("checkpoint", type=Path, metavar="DIR", help="a checkpoint or run")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    logging.basicConfig(format="%(message)s")
    options = _parser().parse_args(arguments)
    checkpoint = find_checkpoint(options.checkpoint)
    if options.command == "inspect":
        sys.stdout.write("".join(f"{line}\n" for line in describe_checkpoint(checkpoint)))
        return
    export_checkpoint(checkpoint, options.output, options.dtype, options.tokenizer)
    sys.stdout.write(f"wrote {options.output}, the model of {checkpoint} in {options.dtype}\n")


if __name__ == "__main__":
    run_cli(main)
