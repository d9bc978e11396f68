"""A plan as pictures: time of the layouts, their memory, and the pipeline's timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bert.parallel.actions import Kind
from megatron_bert.parallel.schedule import end_times, make_schedule
from megatron_bert.pictures import check_name, figure_class, write_figure
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.machines import GIB
from megatron_bert.planner.memory import Memory
from megatron_bert.planner.plan import LayoutPlan, Plan
from megatron_bert.planner.step import Step, StepModel
from megatron_bert.planner.wording import describe_key, describe_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Rounds of micro-batches to draw: as many as can be distinguished.
_DRAWN_ROUNDS = 2
_COLOURS = {
    Kind.FORWARD: "tab:blue",
    Kind.BACKWARD: "tab:green",
    Kind.BACKWARD_INPUT: "tab:green",
    Kind.BACKWARD_WEIGHT: "tab:olive",
}
_WORDS = {
    Kind.FORWARD: "forward blue",
    Kind.BACKWARD: "backward green",
    Kind.BACKWARD_INPUT: "backward green",
    Kind.BACKWARD_WEIGHT: "weights' gradients olive",
}


def write_picture(plan: Plan, picture: Path) -> None:
    """Draw a plan into a file.

    Args:
        plan: what to draw.
        picture: ends in `.svg` or `.png`.

    Raises:
        UserError: the ending is another, matplotlib is missing, or the file cannot be written.
    """
    check_name(picture)
    write_figure(draw(plan), picture)


def draw(plan: Plan) -> Figure:
    """Draw the best layout and those that differ from it in one key.

    The timeline is that of the first of them that has a pipeline; without any it is left out.

    Raises:
        UserError: matplotlib is missing.
    """
    new_figure = figure_class()
    shown = _shown(plan)
    piped = next((entry.layout for _, entry in shown if entry.layout.split.pipeline > 1), None)
    figure = new_figure(figsize=(11, 9 if piped else 6), layout="constrained")
    figure.suptitle(
        f"{plan.job.ranks:,} x {plan.job.machine.gpu.name}\n"
        f"best: {describe_layout(plan.best[0].layout)}",
        fontsize=10,
    )
    axes = figure.subplots(3 if piped else 2, 1)
    _draw_times(axes[0], plan, shown)
    _draw_memory(axes[1], plan, shown)
    if piped is not None:
        _draw_timeline(axes[2], plan, piped)
    return figure


def _shown(plan: Plan) -> list[tuple[str, LayoutPlan]]:
    """The best layout, and for each of its choices the best one without it; each layout once."""
    found: dict[Layout, str] = {plan.best[0].layout: "best"}
    entries = {plan.best[0].layout: plan.best[0]}
    for name, entry in plan.alternatives:
        key = describe_key(entry.layout, name)
        found.setdefault(entry.layout, key if entry.is_simulated else f"{key}, at least")
        entries[entry.layout] = entry
    return [(name, entries[layout]) for layout, name in found.items()]


def _draw_times(axis: Axes, plan: Plan, shown: Sequence[tuple[str, LayoutPlan]]) -> None:
    parts = {
        field.name: [
            sum(
                getattr(stage.step, field.name) * span.num_steps / 86400
                for stage, span in zip(entry.stages, plan.job.spans, strict=True)
            )
            for _, entry in shown
        ]
        for field in fields(Step)
    }
    _stacked(axis, [name for name, _ in shown], parts)
    axis.set_xlabel("days of the whole curriculum (predicted)")


def _draw_memory(axis: Axes, plan: Plan, shown: Sequence[tuple[str, LayoutPlan]]) -> None:
    fullest = [max(e.stages, key=lambda stage: stage.memory.total).memory for _, e in shown]
    parts = {
        field.name: [getattr(memory, field.name) / GIB for memory in fullest]
        for field in fields(Memory)
    }
    _stacked(axis, [name for name, _ in shown], parts)
    axis.axvline(plan.job.machine.usable_bytes / GIB, color="tab:red", linestyle="--")
    axis.set_xlabel("GiB of the fullest GPU (predicted); the line is what it has")


def _stacked(axis: Axes, names: Sequence[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(names)
    for part, values in parts.items():
        if any(values):
            axis.barh(names, values, left=left, label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _draw_timeline(axis: Axes, plan: Plan, layout: Layout) -> None:
    """Draw each rank's computations in the curriculum's longest stage, as far as they fit."""
    split = layout.split
    index = max(range(len(plan.job.spans)), key=lambda n: plan.job.spans[n].num_rows)
    model = StepModel(plan.job, layout, plan.job.spans[index])
    count = min(model.batch.num_micro_batches, _DRAWN_ROUNDS * split.pipeline)
    schedule = make_schedule(split.schedule, split.pipeline, count, split.virtual)
    stages = model.stage_times()
    ends = end_times(schedule, stages, model.message)
    for action, end in ends.items():
        seconds = stages[action.stage].of(action.kind)
        # A rank's stages are distinguished by their lightness.
        lightness = 1.0 - 0.6 * (action.stage // split.pipeline) / split.virtual
        axis.barh(
            action.stage % split.pipeline,
            1e3 * seconds,
            left=1e3 * (end - seconds),
            color=_COLOURS[action.kind],
            alpha=lightness,
            edgecolor="white",
            linewidth=0.4,
        )
    axis.invert_yaxis()
    axis.set_yticks(range(split.pipeline))
    axis.set_ylabel("pipeline rank")
    shown = "" if count == model.batch.num_micro_batches else f", the first {count} micro-batches"
    colours = dict.fromkeys(_WORDS[kind] for kind in Kind if any(a.kind is kind for a in ends))
    axis.set_xlabel(
        f"ms of a step at length {plan.job.spans[index].seq_length}, {split.schedule}{shown}: "
        f"{', '.join(colours)}"
    )
