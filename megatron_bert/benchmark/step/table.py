"""Figures of training steps as a table to read."""

from __future__ import annotations

from megatron_bert.benchmark.step.figures import StepCase, StepFigures
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
    parts = (case.gemm_seconds, case.attention_seconds, case.softmax_seconds)
    alone = ""
    if all(part is not None for part in parts):
        products, attention, softmax = (float(part or 0.0) for part in parts)
        ratio = case.step_seconds / (products + attention + softmax)
        alone = (
            f", {ratio:.2f} x what GEMMs ({products:.4f} s), attention ({attention:.4f} s) and "
            f"softmax ({softmax:.4f} s) take alone"
        )
    rows = [
        (name, f"{case.tokens_per_second:,} tokens/s, {case.tflops_per_gpu:,.1f} TFLOP/s{mfu}"),
        ("  step", f"{case.step_seconds:.4f} s{alone}{memory}"),
    ]
    if case.profiled_seconds is not None:
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in case.shares.items())
        rows.append(("  time in", f"{shares} of {case.profiled_seconds:.3f} s"))
    return rows
