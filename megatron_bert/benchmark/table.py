"""Figures as a table to read."""

from __future__ import annotations

from megatron_bert.benchmark.machine import Hardware

Row = tuple[str, str]
"""What was measured, and the figure with its unit."""


def table_lines(hardware: Hardware, versions: dict[str, str], quick: bool, *rows: Row) -> list[str]:
    """Lines of a table that begins with the machine and the versions."""
    machine = (
        f"{hardware.processor}, {hardware.cores} cores, {hardware.memory_gb:g} GB, "
        f"load average {hardware.load_average:g}"
    )
    shown = ", ".join(f"{name} {is_}" for name, is_ in versions.items())
    rows = (("machine", machine), ("versions", shown), *rows)
    width = max(len(what) for what, _ in rows)
    lines = [f"{what:<{width}}  {figure}" for what, figure in rows]
    if quick:
        lines.insert(0, "A quick run: it shows that everything runs, its figures mean nothing.")
    return lines
