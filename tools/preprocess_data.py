"""Turn text files into an indexed dataset for pretraining: P.bin, P.idx and P.json."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors

with told_errors():
    from megatron_bert.data.dictionary_words import Dictionary
    from megatron_bert.data.parsing import Normalization
    from megatron_bert.data.preprocess import preprocess
    from megatron_bert.data.preprocess_options import PreprocessOptions
    from megatron_bert.data.shards import Shard
    from megatron_bert.data.text_arguments import add_text_arguments
    from megatron_bert.host import usable_cores
    from megatron_bert.words import counted


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        epilog="Documents keep their order. P.bin holds tokens of text only, no special ones. A "
        "job that was killed goes on where it was when it is run again (its work is in P.partial).",
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--tokenizer", required=True, type=Path, metavar="MODEL", help=".model or tokenizer.json"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P")
    parser.add_argument(
        "--field-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help="fields beside the text, as a language or source, by whose values P.json counts "
        "documents and tokens",
    )
    parser.add_argument(
        "--normalize",
        choices=get_args(Normalization),
        default="none",
        help="Unicode's normalization form to bring text into (default: %(default)s)",
    )
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="leave out a document whose whole text was there before; within a shard",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="tokenizing threads (default: one for each core that this process may use, here "
        "%(default)s)",
    )
    parser.add_argument(
        "--word-boundaries",
        choices=get_args(Dictionary),
        help="also write P.words: which tokens begin a word of this dictionary",
    )
    parser.add_argument(
        "--shard",
        metavar="K/N",
        help="take one of N parts, K from 0, into P-0000K-of-0000N: a block of whole files if "
        "there are at least N, else single documents; tools/merge_datasets.py joins them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument(
        "--restart", action="store_true", help="throw away what a killed job has done"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Preprocess the files named on the command line."""
    logging.basicConfig(format="%(message)s")
    given = _parser().parse_args(arguments)
    # The tokenizers library takes the size of its own pool from here, at its first use.
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, given.workers)))
    options = PreprocessOptions(
        inputs=given.input,
        tokenizer=given.tokenizer,
        output_prefix=given.output_prefix,
        json_key=given.json_key,
        field_keys=given.field_key,
        normalize=given.normalize,
        deduplicate=given.deduplicate,
        txt_documents=given.txt_documents,
        word_boundaries=given.word_boundaries,
        shard=None if given.shard is None else Shard.parse(given.shard),
        workers=given.workers,
        on_error=given.on_error,
        overwrite=given.overwrite,
        restart=given.restart,
    )
    counts = preprocess(options)
    words = "" if given.word_boundaries is None else ", .words"
    sys.stdout.write(
        f"wrote {options.dataset_prefix}.bin, .idx{words} and .json: {counts.documents:,} "
        f"documents, {counts.tokens:,} tokens; left out {counted(counts.skipped_lines, 'line')} "
        f"that cannot be used, {counted(counts.empty_documents, 'empty document')} and "
        f"{counted(counts.duplicate_documents, 'duplicate')}\n"
    )


if __name__ == "__main__":
    run_cli(main)
