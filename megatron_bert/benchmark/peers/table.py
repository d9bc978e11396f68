"""Trainers side by side as a table to read."""

from __future__ import annotations

from megatron_bert.benchmark.peers.measure import PeersFigures
from megatron_bert.benchmark.table import Row, table_lines
from megatron_bert.words import counted


def peers_table(figures: PeersFigures) -> list[str]:
    """Lines of the table."""
    rows: list[Row] = [("device", figures.device), ("our keys", figures.ours)]
    rows.extend(figures.trainers.items())
    rows.extend(
        (
            f"length {case.seq_length}, {case.trainer}",
            f"{case.text_tokens_per_second:,} tokens of text/s, ours over it {_told(case.ratio)}; "
            f"{case.rows} rows {case.text_share:.1%} full, {case.step_seconds:.4f} s a step of "
            f"{counted(case.micro_batches, 'micro-batch', 'micro-batches')}",
        )
        for case in figures.cases
    )
    rows.extend((name, f"not measured: {why}") for name, why in figures.failed.items())
    return table_lines(figures.hardware, figures.versions, figures.quick, *rows)


def _told(ratio: float | None) -> str:
    return "unknown" if ratio is None else f"{ratio:.2f}"
