"""Show what a dataset holds, which rows the steps of a run read, or what is in train and valid."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.config.errors import DataError, run_cli
from megatron_bert.config.load import load_config
from megatron_bert.config.places import write_output
from megatron_bert.config.schema import Config
from megatron_bert.data.inspection import describe_dataset, samples
from megatron_bert.data.overlap import describe_overlap
from megatron_bert.data.row_inspection import show_rows
from megatron_bert.data.row_view import item_lines, legend, page
from megatron_bert.data.step_inspection import describe_steps
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
        "--tokenizer",
        metavar="MODEL",
        help="with --prefix: decode the beginnings of documents, count unknown tokens",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="how many documents or duplicates (default: %(default)s)",
    )
    of_run = parser.add_mutually_exclusive_group()
    of_run.add_argument(
        "--steps", metavar="A:B", help="with --config: steps, from 1, both ends included"
    )
    of_run.add_argument(
        "--duplicates",
        action="store_true",
        help="with --config: documents of held-out text that are trained on too",
    )
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        "--text", action="store_true", help="with --steps: their rows too, as text before masking"
    )
    rows.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="with --steps: the first N rows of each, token by token, by segment and mask; and "
        "what all of the steps' rows hold (0: only that)",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="with --rows: write them into a page instead"
    )
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="of --rows; auto: on a terminal, unless NO_COLOR is set (default: %(default)s)",
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
    _check(given)
    if given.config is not None:
        config = load_config(given.config, given.overrides)
        if given.duplicates:
            yield from describe_overlap(config, given.samples)
        elif given.rows is not None:
            yield from _rows(config, given)
        else:
            yield from describe_steps(config, *_steps(given.steps), with_text=given.text)
        return
    tokenizer = None if given.tokenizer is None else Tokenizer.load(given.tokenizer)
    yield from describe_dataset(given.prefix, tokenizer)
    if tokenizer is not None:
        yield from samples(given.prefix, tokenizer, given.samples)


def _check(given: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    if given.samples < 0:
        raise DataError(f"--samples {given.samples}: give 0 or more")
    if given.rows is not None and given.rows < 0:
        raise DataError(f"--rows {given.rows}: give 0 or more")
    if given.html is not None and given.rows is None:
        raise DataError(f"--html {given.html}: it shows the rows that --rows N chooses; give that")
    shows_rows = given.text or given.rows is not None
    if shows_rows and (given.config is None or given.duplicates):
        option = "--text" if given.text else f"--rows {given.rows}"
        raise DataError(f"{option}: shows rows of steps; choose these by --config and --steps")
    if given.config is None and (given.duplicates or given.steps is not None):
        option = "--duplicates" if given.duplicates else f"--steps {given.steps}"
        raise DataError(f"{option}: tells of a run; give its --config instead of --prefix")
    if given.config is None and given.overrides:
        raise DataError(f"{given.overrides[0]}: an override needs --config; give that, or leave it")


def _rows(config: Config, given: argparse.Namespace) -> Iterator[str]:
    first, last = _steps(given.steps)
    items = show_rows(config, first, last, given.rows)
    if given.html is not None:
        write_output(given.html, page(f"Steps {first} to {last} of {given.config}", items))
        yield f"wrote {given.html}"
        return
    coloured = given.color == "always" or (given.color == "auto" and _terminal_has_colours())
    if given.rows:
        yield from legend(coloured=coloured)
    for item in items:
        yield from item_lines(item, coloured=coloured)


def _terminal_has_colours() -> bool:
    """As https://no-color.org asks for it."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the command line asks for."""
    for line in _lines(_parser().parse_intermixed_args(arguments)):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    run_cli(main)
