"""Write the table of Megatron-LM's arguments into the documentation.

`python -m megatron_bert.config.megatron.emit_table` writes what stands between the markers of
`docs/megatron.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_bert.config.errors import ConfigError, run_cli
from megatron_bert.config.megatron.argument import Argument, Fate
from megatron_bert.config.megatron.table import PARTS
from megatron_bert.files import write_atomically

GUIDE_FILE = "megatron.md"
_BEGIN, _END = "<!-- arguments: begin -->", "<!-- arguments: end -->"


def render(guide: str) -> str:
    """The guide with its table made anew; what stands outside the markers is kept.

    Raises:
        ConfigError: A marker is missing.
    """
    before, found_begin, rest = guide.partition(_BEGIN)
    _, found_end, after = rest.partition(_END)
    if not found_begin or not found_end:
        raise ConfigError(f"{GUIDE_FILE}: markers {_BEGIN} and {_END} are missing; restore them")
    parts = [f"### {name}\n\n{_rows(arguments)}" for name, arguments in PARTS.items()]
    return before + _BEGIN + "\n" + "\n\n".join(parts) + "\n" + _END + after


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table into the folder given by `--docs`."""
    parser = argparse.ArgumentParser(prog="emit_table", description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the file")
    guide: Path = parser.parse_args(arguments).docs / GUIDE_FILE
    if not guide.is_file():
        raise ConfigError(f"{guide} does not exist; run in the checkout's root or give --docs")
    write_atomically(guide, render(guide.read_text(encoding="utf-8")))
    return 0


def _rows(arguments: Sequence[Argument]) -> str:
    lines = ["| Megatron-LM | here | remark |", "|---|---|---|"]
    return "\n".join([*lines, *map(_row, arguments)])


def _row(entry: Argument) -> str:
    flags = ", ".join(f"`{flag}`" for flag in entry.flags)
    if entry.fate is Fate.BECOMES:
        here = ", ".join(f"`{key}`" for key in entry.keys)
    else:
        here = entry.fate.value
    notes = [entry.note]
    if entry.values:
        notes.append(f"of other values than {', '.join(f'`{v}`' for v in entry.values)}: none")
    if entry.default is not None:
        notes.append(f"not given: `{entry.default}`")
    return f"| {flags} | {here} | {'; '.join(filter(None, notes))} |"


if __name__ == "__main__":
    run_cli(main)
