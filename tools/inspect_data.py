"""Show what a dataset holds, which rows the steps of a run read, or what is in train and valid."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors
from megatron_bert.errors import DataError

with told_errors():
    from megatron_bert.command_line.places import write_output
    from megatron_bert.config.load import load_config
    from megatron_bert.config.schema import Config
    from megatron_bert.data.indexed_dataset import prefix_of
    from megatron_bert.data.inspection import describe_dataset, samples
    from megatron_bert.data.overlap import describe_overlap
    from megatron_bert.data.row_inspection import show_rows
    from megatron_bert.data.row_view import item_lines, legend, page
    from megatron_bert.data.step_inspection import describe_steps
    from megatron_bert.data.tokenizer import Tokenizer

_SAMPLES = 3


def _parser() -> Parser:
    parser = Parser(
        description=__doc__,
        epilog="With --config, each step's line has its number, its stage and the batch_hash that "
        "training writes into metrics.jsonl.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prefix",
        type=Path,
        metavar="P",
        help="dataset P.bin and P.idx (either file's name is understood too): counts, lengths",
    )
    what.add_argument("--config", type=Path, metavar="FILE", help="configuration of a run")
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="with --prefix: decode the beginnings of documents, count unknown tokens",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="how many documents (with --tokenizer) or duplicates (with --duplicates) to show "
        f"(default: {_SAMPLES})",
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
        help="of --rows; auto: on a terminal, unless NO_COLOR is set (default: auto)",
    )
    return parser


def _steps(given: str | None) -> tuple[int, int]:
    first, _, last = (given or "").partition(":")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise DataError(
            f"--steps {given or 'is missing'}: give the first and the last step, as 1:10, or "
            "--duplicates instead"
        ) from None


def _lines(given: argparse.Namespace) -> Iterator[str]:
    num_samples = _SAMPLES if given.samples is None else given.samples
    if given.config is not None:
        config = load_config(given.config, given.overrides)
        if given.duplicates:
            yield from describe_overlap(config, num_samples)
        elif given.rows is not None:
            yield from _rows(config, given)
        else:
            yield from describe_steps(config, *_steps(given.steps), with_text=given.text)
        return
    tokenizer = None if given.tokenizer is None else Tokenizer.load(given.tokenizer)
    prefix = str(prefix_of(given.prefix, "--prefix"))
    yield from describe_dataset(prefix, tokenizer)
    if tokenizer is not None:
        yield from samples(prefix, tokenizer, num_samples)


def _check_numbers(given: argparse.Namespace) -> None:
    for option, number in (("--samples", given.samples), ("--rows", given.rows)):
        if number is not None and number < 0:
            raise DataError(f"{option} {number}: give 0 or more")


def _purposes(given: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """What `Parser.check_purposes` asks for."""
    of_a_run = given.config is not None
    of_steps = of_a_run and not given.duplicates
    yield "--tokenizer", not of_a_run, "a run's is its data.tokenizer: set that"
    yield "--duplicates", of_a_run, "give a run's --config instead of --prefix"
    yield "--steps", of_a_run, "give a run's --config instead of --prefix"
    yield "--text", of_steps, "choose a run's steps by --config and --steps"
    yield "--rows", of_steps, "choose a run's steps by --config and --steps"
    yield "--html", given.rows is not None, "give --rows N, which chooses the rows it shows"
    yield (
        "--color",
        bool(given.rows) and given.html is None,
        "give --rows N, N from 1, and no --html, whose page has colours of its own",
    )
    yield (
        "--samples",
        given.duplicates or given.tokenizer is not None,
        "give --tokenizer beside --prefix, or --duplicates beside --config",
    )
    yield "overrides", of_a_run, "give a run's --config instead of --prefix"


def _rows(config: Config, given: argparse.Namespace) -> Iterator[str]:
    first, last = _steps(given.steps)
    items = show_rows(config, first, last, given.rows)
    if given.html is not None:
        write_output(given.html, page(f"Steps {first} to {last} of {given.config}", items))
        yield f"wrote {given.html}"
        return
    coloured = _terminal_has_colours() if given.color in (None, "auto") else given.color == "always"
    if given.rows:
        yield from legend(coloured=coloured)
    for item in items:
        yield from item_lines(item, coloured=coloured)


def _terminal_has_colours() -> bool:
    """Whether to use colours, following https://no-color.org."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the command line asks for."""
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    _check_numbers(given)
    parser.check_purposes(given, _purposes(given))
    for line in _lines(given):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    run_cli(main)
