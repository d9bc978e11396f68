"""A plan as text, as a document for machines, and as a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.machines import GIB
from megatron_bert.planner.memory import Memory
from megatron_bert.planner.search import (
    ALIKE_PERCENT,
    SCARCE_PERCENT,
    LayoutPlan,
    Plan,
    StagePlan,
    is_scarce,
)
from megatron_bert.planner.step import Step

# The prediction is not so exact that it could tell these apart.
_UNCERTAIN_PERCENT = 3.0
_WORTH_ANOTHER_LAYOUT_PERCENT = 2.0
# How a configuration begins that a plan wrote.
_PLANNED_FOR = "# Layout planned for"


def describe(plan: Plan, assumed: Sequence[str] = ()) -> Iterator[str]:
    """Yield the plan's lines: the machine, the ranking, the best layout, why, and its keys.

    Args:
        plan: what was found.
        assumed: sentences on what the caller put in where the configuration says nothing.
    """
    yield from _heading(plan)
    yield from (*remarks(plan.job.config), *assumed)
    if plan.job.machine.gpu.name == "cpu":
        yield (
            "a CPU as such is not known: a run was seen to take 5 to 9 times as long or short as "
            "is said here; --calibrate NAME measures this one"
        )
    yield ""
    yield from _ranking(plan)
    best = plan.best[0]
    yield ""
    yield from _stages(plan, best)
    yield ""
    yield from _memory(plan, best)
    yield ""
    yield _why(plan)
    yield "why not another"
    yield from _alternatives(plan)
    yield from _of_stages(plan)
    yield ""
    yield "keys to set"
    for name, value in best.layout.overrides(plan.job.config).items():
        yield f"  {name}={_plain(value)}"


def remarks(config: Config) -> list[str]:
    """Sentences on what of a configuration is planned as something else."""
    if config.precision.fp8 == "none":
        return []
    return [
        f"precision.fp8 = {config.precision.fp8} is planned as BF16: its products are faster, and "
        "a layout that suits BF16 may not be the best"
    ]


def document(plan: Plan, assumed: Sequence[str] = ()) -> dict[str, Any]:
    """The plan as plain values: seconds, bytes, days; arguments as those of `describe`."""
    machine = plan.job.machine
    return {
        "machine": asdict(machine) | {"ranks": plan.job.ranks},
        "vocab_size": plan.job.vocab_size,
        "remarks": [*remarks(plan.job.config), *assumed],
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
    parallel = config.parallel.model_copy(update={"layout": "manual"})
    config = config.model_copy(update={"parallel": parallel})
    machine = plan.job.machine
    heading = (
        f"{_PLANNED_FOR} {plan.job.ranks} x {machine.gpu.name}, {machine.gpus_per_node} a "
        f"node, {machine.network.name} (tools/plan.py).\n"
    )
    return heading + dump_config(config)


def is_written_plan(path: Path) -> bool:
    """Whether a file is one that `configuration` gave."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(len(_PLANNED_FOR)) == _PLANNED_FOR
    except OSError:
        return False


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
    time, memory, hours = _time_unit(plan), _memory_unit(plan), plan.best[0].gpu_hours < 10
    yield f"{'':>3} {time.name:>8} {'GPU hours':>10} {memory.name:>6}  layout"
    for number, entry in enumerate(plan.best, 1):
        of_gpus = f"{entry.gpu_hours:,.3g}" if hours else f"{entry.gpu_hours:,.0f}"
        yield (
            f"{number:>3} {time.show(86400 * entry.days):>8} {of_gpus:>10} "
            f"{memory.show(entry.peak_bytes):>6}  {describe_layout(entry.layout)}"
            f"{_beside_best(plan, entry)}"
        )
    yield (
        "each way to share the model with the best of all else; of those within "
        f"{ALIKE_PERCENT:g} % the simplest comes first"
    )
    first = plan.best[0].days
    alike = sum(entry.days <= first * (1 + _UNCERTAIN_PERCENT / 100) for entry in plan.best)
    if alike > 1:
        yield (
            f"{alike} of them lie within {_UNCERTAIN_PERCENT:g} % of the first: the prediction "
            "does not tell them apart"
        )


def _beside_best(plan: Plan, entry: LayoutPlan) -> str:
    """Why a quicker layout does not come first, and whether its memory is scarce."""
    best, notes = plan.best[0], []
    if entry.days < best.days:
        more, memory = entry.peak_bytes - best.peak_bytes, _memory_unit(plan)
        notes.append(
            f"{100 * (1 - entry.days / best.days):.1f} % quicker, takes "
            f"{memory.show(abs(more))} {memory.name} {'more' if more > 0 else 'less'}"
        )
    if is_scarce(np.array(entry.peak_bytes), plan.job.machine):
        notes.append(f"less than {SCARCE_PERCENT:g} % of the memory is left")
    return f" [{'; '.join(notes)}]" if notes else ""


@dataclass(frozen=True)
class _Unit:
    """What a table's numbers are shown in.

    Attributes:
        name: of the unit.
        size: in seconds or bytes.
    """

    name: str
    size: float

    def show(self, value: float) -> str:
        """A number of the unit."""
        number = value / self.size
        return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _time_unit(plan: Plan) -> _Unit:
    units = (_Unit("days", 86400.0), _Unit("hours", 3600.0), _Unit("minutes", 60.0))
    seconds = 86400 * plan.best[0].days
    return next((unit for unit in units if seconds >= unit.size / 10), _Unit("seconds", 1.0))


def _memory_unit(plan: Plan) -> _Unit:
    peak = plan.best[0].peak_bytes
    return _Unit("GiB", GIB) if peak >= GIB / 10 else _Unit("MiB", 2.0**20)


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
    memory, unit = best.fullest.memory, _memory_unit(plan)
    yield f"its memory on the fullest GPU at the worst moment ({unit.name})"
    for field in fields(Memory):
        value = getattr(memory, field.name)
        if field.name != "logits" or value:
            yield f"  {field.name:<12}{unit.show(value):>8}"
    free = plan.job.machine.usable_bytes - memory.total
    yield f"  {'total':<12}{unit.show(memory.total):>8}, {unit.show(free)} left"
    if not memory.logits:
        most = max(stage.logits for stage in best.stages)
        yield f"  (logits, not at that moment: {unit.show(most)})"


def _why(plan: Plan) -> str:
    """What speaks for the best, in a sentence."""
    best = plan.best[0]
    shares = {
        field.name: sum(
            getattr(stage.step, field.name) * span.num_steps
            for stage, span in zip(best.stages, plan.job.spans, strict=True)
        )
        / (86400 * best.days)
        for field in fields(Step)
    }
    computing = sum(shares.pop(name) for name in ("gemm", "attention", "elementwise"))
    largest = max(shares, key=lambda name: shares[name])
    rivals = [entry for _, entry in plan.alternatives if entry.days < best.days]
    quickest = "the quickest that fits" if not rivals else "the simplest of the quickest that fit"
    return (
        f"why this one: {quickest}; GPUs compute {100 * computing:.0f} % of the time, and of the "
        f"rest the most goes into {largest} ({100 * shares[largest]:.1f} %)"
    )


def _alternatives(plan: Plan) -> Iterator[str]:
    best, time, memory = plan.best[0], _time_unit(plan), _memory_unit(plan)
    for name, entry in plan.alternatives:
        more = 100 * (entry.days / best.days - 1)
        yield (
            f"  {describe_key(entry.layout, name)}: {time.show(86400 * entry.days)} {time.name} "
            f"({more:+.1f} %), {memory.show(entry.peak_bytes)} {memory.name}"
            f"{_reason(plan, best, entry)}"
        )
    if plan.too_large:
        smallest = plan.smallest
        yield (
            f"  {plan.too_large:,} layouts do not fit; the smallest takes "
            f"{memory.show(smallest.peak_bytes)} {memory.name} ({describe_layout(smallest.layout)})"
        )


def _reason(plan: Plan, best: LayoutPlan, other: LayoutPlan) -> str:
    """What the other one spends more on, over the whole curriculum."""
    shares = []
    for field in fields(Step):
        ours, theirs = (
            sum(
                getattr(stage.step, field.name) * span.num_steps
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
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
