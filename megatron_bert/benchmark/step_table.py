"""Figures of training steps as a table to read."""

from __future__ import annotations

from megatron_bert.benchmark.step import StepCase, StepFigures
from megatron_bert.benchmark.table import Row, table_lines


def step_table(figures: StepFigures) -> list[str]:
    """Lines of the table."""
    rows: list[Row] = [
        ("device", f"{figures.device}, {figures.ranks} ranks"),
        ("plain matrix product", f"{figures.matmul_tflops:,.2f} TFLOP/s"),
    ]
    for case in figures.cases:
        rows.extend(_case(case))
    rows.extend((name, f"not measured: {why}") for name, why in figures.failed.items())
    return table_lines(figures.hardware, figures.versions, figures.quick, *rows)


def _case(case: StepCase) -> list[Row]:
    name = f"length {case.seq_length}, {case.rows} rows, dropout {case.dropout:g}"
    mfu = "" if case.mfu is None else f", MFU {case.mfu:.1%}"
    memory = "" if case.peak_memory_gb is None else f", {case.peak_memory_gb:.1f} GB"
    alone = "" if case.gemm_seconds is None else f", GEMMs alone {case.gemm_seconds:.4f} s"
    rows = [
        (name, f"{case.tokens_per_second:,} tokens/s, {case.tflops_per_gpu:,.1f} TFLOP/s{mfu}"),
        ("  step", f"{case.step_seconds:.4f} s{alone}{memory}"),
    ]
    if case.shares:
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in case.shares.items())
        rows.append(("  time in", shares))
    return rows
