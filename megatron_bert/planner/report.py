"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.planner.machines import GIB
from megatron_bert.planner.memory import Memory
from megatron_bert.planner.ordering import ALIKE_PERCENT
from megatron_bert.planner.plan import LayoutPlan, Plan
from megatron_bert.planner.reasons import (
    alternatives,
    beside_best,
    cautions,
    quicker_in_a_stage,
    why,
)
from megatron_bert.planner.step import Step
from megatron_bert.planner.wording import (
    describe_layout,
    memory_unit,
    plain,
    remarks,
    significant,
    time_unit,
    unit_for,
)

# The prediction is not accurate enough to distinguish layouts within this margin.
_UNCERTAIN_PERCENT = 3.0


def describe(plan: Plan, assumed: Sequence[str] = ()) -> Iterator[str]:
    """Yield the plan's lines: the machine, the ranking, the best layout, why, and its keys.

    Args:
        plan: what was found.
        assumed: sentences on what the caller assumed where the configuration says nothing.
    """
    yield from _heading(plan)
    yield from (*remarks(plan.job.config), *assumed)
    if plan.job.machine.gpu.name == "cpu":
        yield (
            "a CPU as such is not known: a run was seen to take 5 to 9 times as long or short as "
            "is said here; tools/plan.py --calibrate NAME measures this one"
        )
    yield ""
    yield from _ranking(plan)
    best = plan.best[0]
    yield ""
    yield from _stages(plan, best)
    yield ""
    yield from _memory(plan, best)
    yield ""
    yield why(plan)
    yield "why not another"
    yield from alternatives(plan)
    yield from quicker_in_a_stage(plan)
    yield ""
    yield "keys to set"
    for name, value in best.layout.overrides(plan.job.config).items():
        yield f"  {name}={plain(value)}"


def _heading(plan: Plan) -> Iterator[str]:
    machine = plan.job.machine
    nodes = ceil_div(plan.job.ranks, machine.gpus_per_node)
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
    time, memory = time_unit(plan), memory_unit(plan)
    gpu_time = unit_for(plan.best[0].gpu_hours, "GPU hours", 1.0)
    yield f"{'':>3} {time.name:>8} {gpu_time.name:>10} {memory.name:>6}  layout"
    for number, entry in enumerate(plan.best, 1):
        yield (
            f"{number:>3} {time.show(86400 * entry.days):>8} {gpu_time.show(entry.gpu_hours):>10} "
            f"{memory.show(entry.peak_bytes):>6}  {describe_layout(entry.layout)}"
            f"{beside_best(plan, entry)}"
        )
    yield (
        "each way to share the model with the best of all else; of those within "
        f"{ALIKE_PERCENT:g} % the simplest comes first"
    )
    yield from cautions(plan)
    first = plan.best[0].days
    alike = sum(entry.days <= first * (1 + _UNCERTAIN_PERCENT / 100) for entry in plan.best)
    if alike > 1:
        yield (
            f"{alike} of them lie within {_UNCERTAIN_PERCENT:g} % of the first: the prediction "
            "does not tell them apart"
        )


def _stages(plan: Plan, best: LayoutPlan) -> Iterator[str]:
    names = [field.name for field in fields(Step)]
    ms = unit_for(min(stage.step.total for stage in best.stages), "ms", 1e-3)
    columns = "".join(f"{name:>12}" for name in names)
    yield f"the best one, a step in each stage of the curriculum ({ms.name})"
    yield f"{'length':>8} {'rows':>9} {'step':>10} {'tokens/s':>12} {'MFU':>7}{columns}"
    for stage, span in zip(best.stages, plan.job.spans, strict=True):
        parts = "".join(f"{ms.show(getattr(stage.step, name)):>12}" for name in names)
        rows = f"{stage.micro_batches} x {stage.micro_rows}"
        yield (
            f"{span.seq_length:>8} {rows:>9} {ms.show(stage.step.total):>10} "
            f"{significant(stage.tokens_per_second):>12} {100 * stage.mfu:>5.1f} %{parts}"
        )
    if plan.job.records(best.layout):
        yield "its passes are counted as recorded ones (compile.cuda_graphs)"
    if not best.is_simulated:
        yield "its steps may be longer: simulating its pipeline would take too long"
    surplus = max(best.stages, key=lambda stage: stage.surplus_share).surplus_share
    if surplus:
        yield f"up to {100 * surplus:.3g} % of the computed rows are surplus"


def _memory(plan: Plan, best: LayoutPlan) -> Iterator[str]:
    memory, unit = best.fullest.memory, memory_unit(plan)
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
