"""Show what a dataset holds, or which rows the steps of a run read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.config.errors import DataError, run_cli
from megatron_bert.config.load import load_config
from megatron_bert.data.inspection import describe_dataset, describe_steps, samples
from megatron_bert.data.tokenizer import Tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="With --config, each step's line has its number, its stage and the batch_hash that "
        "training writes into metrics.jsonl.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prefix", metavar="P", help="dataset P.bin and P.idx: counts, lengths")
    what.add_argument("--config", type=Path, metavar="FILE", help="configuration of a run")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="with --prefix: decode the beginnings of documents"
    )
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", metavar="A:B", help="with --config: steps, from 1, both ends included"
    )
    parser.add_argument(
        "--text", action="store_true", help="with --steps: their rows too, as text before masking"
    )
    return parser


def _steps(given: str | None) -> tuple[int, int]:
    first, _, last = (given or "").partition(":")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise DataError(
            f"--steps {given or 'is missing'}: give the first and the last step, as 1:10"
        ) from None


def _lines(given: argparse.Namespace) -> Iterator[str]:
    if given.config is not None:
        config = load_config(given.config, given.overrides)
        yield from describe_steps(config, *_steps(given.steps), with_text=given.text)
        return
    if given.text:
        raise DataError("--text: shows the rows of steps, which --config and --steps choose")
    if given.overrides:
        raise DataError(f"{given.overrides[0]}: an override needs --config")
    if given.samples < 0:
        raise DataError(f"--samples {given.samples}: give 0 or more")
    yield from describe_dataset(given.prefix)
    if given.tokenizer is not None:
        yield from samples(given.prefix, Tokenizer.load(given.tokenizer), given.samples)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the command line asks for."""
    for line in _lines(_parser().parse_intermixed_args(arguments)):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    run_cli(main)
