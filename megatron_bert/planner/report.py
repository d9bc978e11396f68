"""A plan as text, as a document for machines, and as a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from megatron_bert.config.load import dump_config
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.machines import GIB
from megatron_bert.planner.memory import Memory
from megatron_bert.planner.search import LayoutPlan, Plan, StagePlan
from megatron_bert.planner.step import Step

# Layouts as quick as this are told apart by nothing that the model knows.
_ALIKE_PERCENT = 3.0
_WORTH_ANOTHER_LAYOUT_PERCENT = 2.0


def describe(plan: Plan) -> Iterator[str]:
    """Yield the plan's lines: the machine, the ranking, the best layout, why, and its keys."""
    yield from _heading(plan)
    yield ""
    yield from _ranking(plan)
    best = plan.best[0]
    yield ""
    yield from _stages(plan, best)
    yield ""
    yield from _memory(plan, best)
    yield ""
    yield "why not another"
    yield from _alternatives(plan)
    yield from _of_stages(plan)
    yield ""
    yield "keys to set"
    for name, value in best.layout.keys().items():
        yield f"  {name}={_plain(value)}"


def document(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: seconds, bytes, days."""
    machine = plan.job.machine
    return {
        "machine": asdict(machine) | {"ranks": plan.job.ranks},
        "usable_bytes": machine.usable_bytes,
        "legal": plan.legal,
        "too_large": plan.too_large,
        "best": [_layout_document(entry) for entry in plan.best],
        "alternatives": {name: _layout_document(entry) for name, entry in plan.alternatives},
        "of_stages": [_layout_document(entry) for entry in plan.of_stages],
    }


def configuration(plan: Plan, layout: Layout) -> str:
    """The run's configuration with a layout in it, as YAML."""
    config = layout.put_into(plan.job.config)
    machine = plan.job.machine
    heading = (
        f"# Layout planned for {plan.job.ranks} x {machine.gpu.name}, {machine.gpus_per_node} a "
        f"node, {machine.network.name} (tools/plan.py).\n"
    )
    return heading + dump_config(config)


def describe_layout(layout: Layout) -> str:
    """A layout in a line."""
    split = layout.split
    words = [f"tensor {split.tensor}" + (" + sequence" if split.sequence else "")]
    if split.pipeline > 1:
        virtual = f" x {split.virtual}" if split.virtual > 1 else ""
        words.append(f"pipeline {split.pipeline} ({split.schedule}{virtual})")
    copies = f" ({layout.replicate} copies)" if layout.replicate > 1 else ""
    words.append(f"data {split.data}{copies}")
    words.append(f"micro-batches of {layout.micro_tokens:,} slots")
    if layout.reshard:
        words.append("reshard")
    if layout.recompute != "none":
        words.append(f"recompute {layout.recompute}")
    return ", ".join(words)


def _layout_document(entry: LayoutPlan) -> dict[str, Any]:
    return {
        "keys": entry.layout.keys(),
        "days": entry.days,
        "gpu_hours": entry.gpu_hours,
        "peak_bytes": entry.peak_bytes,
        "stages": [
            asdict(stage) | {"step_seconds": stage.step.total, "memory_bytes": stage.memory.total}
            for stage in entry.stages
        ],
    }


def _heading(plan: Plan) -> Iterator[str]:
    machine = plan.job.machine
    nodes = -(-plan.job.ranks // machine.gpus_per_node)
    yield (
        f"{plan.job.ranks:,} x {machine.gpu.name} on {nodes:,} nodes of {machine.gpus_per_node}, "
        f"network {machine.network.name} ({machine.network.per_node:g} GB/s a node), "
        f"{machine.usable_bytes / GIB:.1f} GiB a GPU to use"
    )
    yield (
        f"{plan.legal:,} legal layouts, {plan.too_large:,} of them too large; predicted, not "
        "measured (docs/scaling.md says what is assumed)"
    )


def _ranking(plan: Plan) -> Iterator[str]:
    yield f"{'':>3} {'days':>8} {'GPU hours':>10} {'GiB':>6}  layout"
    for number, entry in enumerate(plan.best, 1):
        yield (
            f"{number:>3} {entry.days:>8.3g} {entry.gpu_hours:>10,.0f} "
            f"{entry.peak_bytes / GIB:>6.1f}  {describe_layout(entry.layout)}"
        )
    first = plan.best[0].days
    alike = sum(entry.days <= first * (1 + _ALIKE_PERCENT / 100) for entry in plan.best)
    if alike > 1:
        yield (
            f"the first {alike} lie within {_ALIKE_PERCENT:g} % of each other: the prediction does "
            "not tell them apart"
        )


def _stages(plan: Plan, best: LayoutPlan) -> Iterator[str]:
    names = [field.name for field in fields(Step)]
    columns = "".join(f"{name:>12}" for name in names)
    yield "the best one, a step in each stage of the curriculum (ms)"
    yield f"{'length':>8} {'rows':>9} {'step':>10} {'tokens/s':>12} {'MFU':>7}{columns}"
    for stage, span in zip(best.stages, plan.job.spans, strict=True):
        parts = "".join(f"{1e3 * getattr(stage.step, name):>12.1f}" for name in names)
        rows = f"{stage.micro_batches} x {stage.micro_rows}"
        yield (
            f"{span.seq_length:>8} {rows:>9} {1e3 * stage.step.total:>10.1f} "
            f"{stage.tokens_per_second:>12,.0f} {100 * stage.mfu:>5.1f} %{parts}"
        )
    if any(not stage.is_simulated for stage in best.stages):
        yield "the pipeline's bubble is had by a formula: its simulation would take too long"
    surplus = max(best.stages, key=lambda stage: stage.surplus_share).surplus_share
    if surplus:
        yield f"up to {100 * surplus:.3g} % of the computed rows are surplus"


def _memory(plan: Plan, best: LayoutPlan) -> Iterator[str]:
    stage = max(best.stages, key=lambda stage: stage.memory.total)
    yield "its memory on the fullest GPU (GiB)"
    for field in fields(Memory):
        yield f"  {field.name:<12}{getattr(stage.memory, field.name) / GIB:>8.2f}"
    free = plan.job.machine.usable_bytes - stage.memory.total
    yield f"  {'total':<12}{stage.memory.total / GIB:>8.2f}, {free / GIB:.2f} left"


def _alternatives(plan: Plan) -> Iterator[str]:
    best = plan.best[0]
    for name, entry in plan.alternatives:
        more = 100 * (entry.days / best.days - 1)
        yield (
            f"  {describe_key(entry.layout, name)}: {entry.days:.3g} days ({more:+.1f} %), "
            f"{entry.peak_bytes / GIB:.1f} GiB{_reason(plan, best, entry)}"
        )
    if plan.too_large:
        smallest = plan.smallest
        yield (
            f"  {plan.too_large:,} layouts do not fit; the smallest takes "
            f"{smallest.peak_bytes / GIB:.1f} GiB ({describe_layout(smallest.layout)})"
        )


def _reason(plan: Plan, best: LayoutPlan, other: LayoutPlan) -> str:
    """What the other one spends more on, over the whole curriculum."""
    shares = []
    for field in fields(Step):
        ours, theirs = (
            sum(
                getattr(stage.step, field.name) * (span.last_step - span.first_step + 1)
                for stage, span in zip(entry.stages, plan.job.spans, strict=True)
            )
            for entry in (best, other)
        )
        shares.append((100 * (theirs - ours) / (86400 * best.days), field.name))
    largest, name = max(shares)
    return f": {name} {largest:+.1f} %" if largest > 0.05 else ""


def _of_stages(plan: Plan) -> Iterator[str]:
    """Where another layout is quicker in a stage: the jobs of a run may each have their own."""
    best = plan.best[0]
    for index, (entry, span) in enumerate(zip(plan.of_stages, plan.job.spans, strict=True)):
        ours: StagePlan = best.stages[index]
        gained = 100 * (1 - entry.stages[index].step.total / ours.step.total)
        if gained >= _WORTH_ANOTHER_LAYOUT_PERCENT:
            yield (
                f"  at length {span.seq_length} alone {describe_layout(entry.layout)} would be "
                f"{gained:.1f} % quicker; a run's jobs may each have a layout of their own"
            )


def describe_key(layout: Layout, name: str) -> str:
    """One choice of a layout, as its key is set."""
    keys = layout.keys()
    stages = f" x {keys['parallel.virtual_stages']}" if name == "parallel.pipeline_schedule" else ""
    return f"{name}={_plain(keys[name])}{stages}"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
