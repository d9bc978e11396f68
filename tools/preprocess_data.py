"""Turn text files into an indexed dataset for pretraining: P.bin, P.idx and P.json."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.config.errors import run_cli
from megatron_bert.data.preprocess import PreprocessOptions, preprocess


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Files are .jsonl (an object with the text a line) or .txt, also packed as .gz or "
        ".zst. Documents keep their order. P.bin holds tokens of text only, no special ones.",
    )
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE")
    parser.add_argument(
        "--tokenizer", required=True, type=Path, metavar="MODEL", help=".model or tokenizer.json"
    )
    parser.add_argument("--output-prefix", required=True, type=Path, metavar="P")
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in .jsonl (default: %(default)s)",
    )
    parser.add_argument(
        "--txt-documents",
        choices=("line", "blank-line"),
        default="line",
        help="a document of .txt is a line, or a block ended by blank lines (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="tokenizing threads (default: one a core, here %(default)s)",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a line that cannot be used: stop, or leave it out (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Preprocess the files named on the command line."""
    logging.basicConfig(format="%(message)s")
    given = _parser().parse_args(arguments)
    # The tokenizers library takes the size of its own pool from here, at its first use.
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, given.workers)))
    counts = preprocess(
        PreprocessOptions(
            inputs=given.input,
            tokenizer=given.tokenizer,
            output_prefix=given.output_prefix,
            json_key=given.json_key,
            txt_documents=given.txt_documents,
            workers=given.workers,
            on_error=given.on_error,
            overwrite=given.overwrite,
        )
    )
    sys.stdout.write(
        f"wrote {given.output_prefix}.bin, .idx and .json: {counts.documents:,} documents, "
        f"{counts.tokens:,} tokens; left out {counts.skipped_lines:,} lines that cannot be used "
        f"and {counts.empty_documents:,} empty documents\n"
    )


if __name__ == "__main__":
    run_cli(main)
