"""Hold out some documents of a corpus, by the hash of their text, for validation."""

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
    from megatron_bert.data.split import split_documents
    from megatron_bert.data.text_arguments import add_text_arguments, open_texts


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        epilog="Equal texts stay together. Both files are .jsonl. Lines of .jsonl keep all their "
        "keys; of other files only the text is kept, under --json-key.",
    )
    add_text_arguments(parser)
    parser.add_argument("--train", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--valid", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the documents to hold out, at least one (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Split the files named on the command line."""
    logging.basicConfig(format="%(message)s")
    options = _parser().parse_args(arguments)
    counts = split_documents(
        open_texts(options),
        options.train,
        options.valid,
        options.fraction,
        on_error=options.on_error,
        overwrite=options.overwrite,
    )
    sys.stdout.write(
        f"wrote {options.train}: {counts.train:,} documents, and {options.valid}: "
        f"{counts.held_out:,}\n"
    )


if __name__ == "__main__":
    run_cli(main)
