"""Join datasets into one: P.bin, P.idx and, where all of them have one, P.json and P.words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors

with told_errors():
    from megatron_bert.data.merge import merge_datasets

_MOST_NAMES = 3


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        epilog="Datasets are joined in the order given, shards (S-00000-of-00004 and so on) by "
        "their number. They need the same tokenizer and, for P.words, the same dictionary. The "
        "result is that of preprocessing all their texts at once.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="dataset PREFIX.bin and PREFIX.idx; either file's name is understood too",
    )
    parser.add_argument("--output-prefix", required=True, metavar="P")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    return parser


def _tell_of_absent(output_prefix: str, suffix: str, without: Sequence[Path]) -> None:
    if without:
        names = ", ".join(f"{prefix}{suffix}" for prefix in without[:_MOST_NAMES])
        more = f" and {len(without) - _MOST_NAMES:,} more" if len(without) > _MOST_NAMES else ""
        sys.stdout.write(f"no {output_prefix}{suffix}, because there is no {names}{more}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge the datasets named on the command line."""
    given = _parser().parse_args(arguments)
    merged = merge_datasets(given.input, given.output_prefix, overwrite=given.overwrite)
    _tell_of_absent(given.output_prefix, ".json", merged.without_info)
    if len(merged.without_word_starts) < len(merged.inputs):
        _tell_of_absent(given.output_prefix, ".words", merged.without_word_starts)
    sys.stdout.write(
        f"wrote {given.output_prefix}: {len(merged.inputs):,} datasets, {merged.documents:,} "
        f"documents, {merged.tokens:,} tokens\n"
    )


if __name__ == "__main__":
    run_cli(main)
