"""Write one self-contained HTML page about a run: its curves, stages, figures and configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.config.errors import run_cli
from megatron_bert.training.report import RunRecords, write_picture, write_report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run directory")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="the page (default: report.html in the run directory)",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="write the curves as .svg or .png too"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and print the run in short."""
    options = _parser().parse_args(arguments)
    run = RunRecords.read(options.run)
    output = options.output or options.run / "report.html"
    if options.picture is not None:
        write_picture(run, options.picture)
    write_report(run, output)
    for label, text in run.facts().items():
        sys.stdout.write(f"{label:<14}{text}\n")
    sys.stdout.write(f"wrote {output}\n")


if __name__ == "__main__":
    run_cli(main)
