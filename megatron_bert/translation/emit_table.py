"""Write the table of Megatron-LM's arguments into the documentation.

`python -m megatron_bert.translation.emit_table` writes what stands between the markers of
`docs/megatron.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_bert.command_line.emitted_tables import guide_to_write, with_tables
from megatron_bert.command_line.run import run_cli
from megatron_bert.files import write_atomically
from megatron_bert.translation.argument import Argument, Fate
from megatron_bert.translation.table import PARTS

GUIDE_FILE = "megatron.md"


def render(guide: str) -> str:
    """The guide with its table regenerated; text outside the markers is kept.

    Raises:
        ConfigError: A marker is missing.
    """
    return with_tables(guide, GUIDE_FILE, {"arguments": _lines()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table into the folder given by `--docs`."""
    guide = guide_to_write(arguments, GUIDE_FILE, __doc__)
    write_atomically(guide, render(guide.read_text(encoding="utf-8")))
    return 0


def _lines() -> Iterator[str]:
    for number, (name, arguments) in enumerate(PARTS.items()):
        if number:
            yield ""
        yield from (f"### {name}", "", "| Megatron-LM | here | remark |", "|---|---|---|")
        yield from map(_row, arguments)


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
