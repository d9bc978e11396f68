"""Figures of a step's pieces as a table to read."""

from __future__ import annotations

from megatron_bert.benchmark.kernels.measure import KernelFigures, KernelTime
from megatron_bert.benchmark.table import Row, table_lines


def kernels_table(figures: KernelFigures) -> list[str]:
    """Lines of the table."""
    rows: list[Row] = [("device", f"{figures.device}, {figures.compute}")]
    for piece in figures.pieces:
        rows.append((piece.piece, piece.shape))
        rows.extend((f"  {time.name}", _times(time)) for time in piece.times)
        rows.extend((f"  {name}", f"not measured: {why}") for name, why in piece.absent.items())
    return table_lines(figures.hardware, figures.versions, figures.quick, *rows)


def _times(time: KernelTime) -> str:
    shown = f"{time.forward_microseconds:,.1f} us"
    if time.both_microseconds is not None:
        shown = f"forward {shown}, with backward {time.both_microseconds:,.1f} us"
    if time.tflops is not None:
        shown += f", {time.tflops:,.3g} TFLOP/s"
    if time.gb_per_second is not None:
        shown += f", {time.gb_per_second:,.1f} GB/s"
    if time.difference:
        shown += f", differs by {time.difference:.1e}"
    return shown
