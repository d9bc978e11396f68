"""The figures of a pipeline as a table to read."""

from __future__ import annotations

from megatron_bert.benchmark.pipeline.measure import PipelineFigures, ScheduleFigures
from megatron_bert.benchmark.table import table_lines


def pipeline_table(figures: PipelineFigures) -> list[str]:
    """Lines of the table."""
    work = figures.work
    return table_lines(
        figures.hardware,
        figures.versions,
        figures.quick,
        (
            "pipeline",
            f"{work.ranks} ranks, {work.micro_batches} micro-batches, forward "
            f"{1000 * work.seconds:g} ms and backward {2000 * work.seconds:g} ms each",
        ),
        *((f"idle: {schedule.name}", _idle(schedule)) for schedule in figures.schedules),
    )


def _idle(schedule: ScheduleFigures) -> str:
    formula = schedule.formula_idle_share
    shown = "" if formula is None else f", formula {100 * formula:.1f} %"
    return (
        f"measured {100 * schedule.measured_idle_share:.1f} %, simulated "
        f"{100 * schedule.simulated_idle_share:.1f} %{shown}; {schedule.step_seconds:.3f} s a step"
    )
