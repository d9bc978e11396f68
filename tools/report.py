"""Write one self-contained HTML page about runs: curves, stages, events, figures, configuration.

The page needs no network. With several runs their curves stand in the same charts, and the keys in
which their configurations differ in a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors
from megatron_bert.errors import ConfigError

with told_errors():
    from megatron_bert.pictures import check_name
    from megatron_bert.report.page import write_page
    from megatron_bert.report.picture import write_picture
    from megatron_bert.report.records import RunRecords


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="a run directory")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="the page (default: report.html in the first run directory)",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="write loss and learning rate as .svg or .png too (needs matplotlib)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and print the runs in short."""
    options = _parser().parse_args(arguments)
    if options.picture is not None:
        check_name(options.picture)
    if options.output is not None and options.output.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {options.output}: give a name that ends in .html")
    runs = [RunRecords.read(directory) for directory in options.runs]
    output = options.output or options.runs[0] / "report.html"
    if options.picture is not None:
        write_picture(runs, options.picture)
        sys.stdout.write(f"wrote {options.picture}\n")
    write_page(runs, output)
    for run in runs:
        for label, text in run.facts().items():
            sys.stdout.write(f"{label:<14}{text}\n")
        sys.stdout.write("\n" if len(runs) > 1 else "")
    sys.stdout.write(f"wrote {output}\n")


if __name__ == "__main__":
    run_cli(main)
