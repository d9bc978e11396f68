"""Convert training checkpoints for Hugging Face's transformers and back, or show what is in one."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors

with told_errors():
    from megatron_bert.checkpoint.huggingface_import import TOKENIZER_NAME, import_model
    from megatron_bert.checkpoint.store import find_checkpoint
    from megatron_bert.checkpoint.summary import (
        describe_checkpoint,
        describe_huggingface,
        is_huggingface,
    )
    from megatron_bert.config.yaml_text import format_document
    from megatron_bert.run.export import export_model


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_to_hf(commands)
    _add_from_hf(commands)
    inspect = commands.add_parser(
        "inspect",
        help="print step, shape and content of a checkpoint or a Hugging Face directory",
        description="Print what a checkpoint or a Hugging Face directory holds.",
    )
    inspect.add_argument(
        "directory", type=Path, metavar="DIR", help="a checkpoint, a run, or what to-hf has written"
    )
    inspect.add_argument(
        "--no-verify",
        action="store_true",
        help="do not read a checkpoint's files to compare them with its manifest; of a run the "
        "newest checkpoint is shown, intact or not",
    )
    return parser


def _add_to_hf(commands: argparse._SubParsersAction[Parser]) -> None:
    to_hf = commands.add_parser(
        "to-hf",
        help="write a directory for AutoModelForMaskedLM and AutoTokenizer",
        description="Write a directory that transformers loads: config.json, model.safetensors, "
        "tokenizer, model card. RetrievaBERT's modeling code lies in it too and needs "
        "trust_remote_code=True; ModernBERT's is transformers' own.",
    )
    to_hf.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="a checkpoint (runs/NAME/checkpoints/step_00001234), or a run directory, whose "
        "newest intact one is taken",
    )
    _add_output(to_hf, "directory to make")
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
    to_hf.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="licence of the weights for the model card, e.g. apache-2.0 (default: %(default)s)",
    )
    to_hf.add_argument(
        "--language",
        type=lambda text: text.split(","),
        default=[],
        metavar="CODE[,CODE...]",
        help="languages of the training text for the model card, e.g. ja or ja,en (default: not "
        "said)",
    )


def _add_from_hf(commands: argparse._SubParsersAction[Parser]) -> None:
    from_hf = commands.add_parser(
        "from-hf",
        help="write a checkpoint that pretraining goes on from",
        description="Write a checkpoint of step 0 with the weights of a directory that to-hf or "
        "save_pretrained has written, for checkpoint.resume in a new run.dir, in any layout.",
    )
    from_hf.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="config.json and safetensors"
    )
    _add_output(from_hf, "the checkpoint's folder, to make")
    from_hf.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="the tokenizer that the run's data are made with (default: DIR/tokenizer.json)",
    )
    from_hf.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the embedding table to have; added ones change nothing (default: as it is)",
    )


def _add_output(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    logging.basicConfig(format="%(message)s")
    options = _parser().parse_args(arguments)
    command = {"to-hf": _to_hf, "from-hf": _from_hf, "inspect": _inspect}[options.command]
    command(options)


def _to_hf(options: argparse.Namespace) -> None:
    checkpoint = export_model(
        options.checkpoint,
        options.output,
        options.dtype,
        tokenizer=options.tokenizer,
        license_id=options.license,
        languages=options.language,
    )
    sys.stdout.write(f"wrote {options.output}, the model of {checkpoint} in {options.dtype}\n")


def _from_hf(options: argparse.Namespace) -> None:
    model = import_model(options.model, options.output, options.tokenizer, options.vocab_size)
    tokenizer = options.tokenizer or options.model / TOKENIZER_NAME
    keys = {
        "model": model.model_dump(mode="json", exclude={"preset", *model.unused_keys}),
        "data": {"tokenizer": str(tokenizer)},
        "checkpoint": {"resume": str(options.output)},
    }
    others = (
        "; for data of another file with the same pieces, convert it with --tokenizer, as "
        "--tokenizer data/my.model"
        if options.tokenizer is None
        else ""
    )
    sys.stdout.write(
        f"wrote {options.output}, a checkpoint of step 0 for data made with {tokenizer}{others}. "
        f"A run that goes on from it, in any layout, has\n{format_document(keys)}"
    )


def _inspect(options: argparse.Namespace) -> None:
    if is_huggingface(options.directory):
        lines = describe_huggingface(options.directory)
    else:
        verify = not options.no_verify
        folder = find_checkpoint(options.directory, verify=verify)
        lines = describe_checkpoint(folder, is_verified=verify)
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    run_cli(main)
