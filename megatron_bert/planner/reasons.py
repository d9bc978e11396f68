"""Why a plan's best layout is the best one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from megatron_bert.planner.ordering import SCARCE_PERCENT, is_scarce
from megatron_bert.planner.plan import LayoutPlan, Plan, StagePlan
from megatron_bert.planner.step import Step
from megatron_bert.planner.wording import (
    describe_key,
    describe_layout,
    memory_unit,
    significant,
    time_unit,
)

_WORTH_ANOTHER_LAYOUT_PERCENT = 2.0


def beside_best(plan: Plan, entry: LayoutPlan) -> str:
    """Notes on a layout.

    These are whether it may be slower than said, how much faster than the best it is, and whether
    memory is scarce.
    """
    best, notes = plan.best[0], []
    if not entry.is_simulated:
        notes.append("at least: its pipeline was not simulated")
    if entry.days < best.days:
        more, memory = entry.peak_bytes - best.peak_bytes, memory_unit(plan)
        notes.append(
            f"{100 * (1 - entry.days / best.days):.1f} % quicker, takes "
            f"{significant(abs(more) / memory.size)} {memory.name} {'more' if more > 0 else 'less'}"
        )
    if _is_scarce(plan, entry):
        notes.append(f"less than {SCARCE_PERCENT:g} % of the memory is left")
    return f" [{'; '.join(notes)}]" if notes else ""


def cautions(plan: Plan) -> Iterator[str]:
    """Yield what to beware of in the best layout."""
    if _is_scarce(plan, plan.best[0]):
        yield (
            f"every layout that fits leaves less than {SCARCE_PERCENT:g} % of the memory, and the "
            "prediction may be off by more: this one may run out of it"
        )


def _is_scarce(plan: Plan, entry: LayoutPlan) -> bool:
    return bool(is_scarce(np.array(entry.peak_bytes), plan.job.machine))


def why(plan: Plan) -> str:
    """A sentence on why the best layout is the best."""
    best = plan.best[0]
    shares = _shares(plan, best)
    computing = sum(shares.pop(name) for name in ("gemm", "attention", "elementwise"))
    largest = max(shares, key=lambda name: shares[name])
    rivals = [entry for _, entry in plan.alternatives if entry.days < best.days]
    quickest = "the simplest of the quickest" if rivals else "the quickest"
    if plan.tight is None:
        quickest += " that fit" if rivals else " that fits"
    else:
        quickest += f" with {SCARCE_PERCENT:g} % of the memory left"
    return (
        f"why this one: {quickest}; GPUs compute {100 * computing:.0f} % of the time, and of the "
        f"rest the most goes into {largest} ({100 * shares[largest]:.1f} %)"
    )


def alternatives(plan: Plan) -> Iterator[str]:
    """Yield what each other choice would cost, and what does not fit."""
    memory = memory_unit(plan)
    for name, entry in plan.alternatives:
        yield f"  {describe_key(entry.layout, name)}: {_costs(plan, entry)}{_reason(plan, entry)}"
    if plan.tight is not None:
        yield (
            f"  less than {SCARCE_PERCENT:g} % of the memory left: {_costs(plan, plan.tight)} "
            f"({describe_layout(plan.tight.layout)})"
        )
    if plan.too_large:
        smallest = plan.smallest
        yield (
            f"  {plan.too_large:,} layouts do not fit; the smallest of all takes "
            f"{memory.show(smallest.peak_bytes)} {memory.name} ({describe_layout(smallest.layout)})"
        )


def _costs(plan: Plan, entry: LayoutPlan) -> str:
    """Time, the difference from the best layout's, and memory."""
    time, memory = time_unit(plan), memory_unit(plan)
    more = 100 * (entry.days / plan.best[0].days - 1)
    return (
        f"{'' if entry.is_simulated else 'at least '}{time.show(86400 * entry.days)} {time.name} "
        f"({more:+.1f} %), {memory.show(entry.peak_bytes)} {memory.name}"
    )


def _reason(plan: Plan, other: LayoutPlan) -> str:
    """What another layout spends more time on than the best, over the whole curriculum."""
    ours, theirs = _shares(plan, plan.best[0]), _shares(plan, other)
    largest, name = max((100 * (theirs[name] - ours[name]), name) for name in ours)
    return f": {name} {largest:+.1f} %" if largest > 0.05 else ""


def _shares(plan: Plan, entry: LayoutPlan) -> dict[str, float]:
    """Time of the parts of a layout's steps, as shares of the best layout's total time."""
    return {
        field.name: sum(
            getattr(stage.step, field.name) * span.num_steps
            for stage, span in zip(entry.stages, plan.job.spans, strict=True)
        )
        / (86400 * plan.best[0].days)
        for field in fields(Step)
    }


def quicker_in_a_stage(plan: Plan) -> Iterator[str]:
    """Yield stages in which another layout is faster: each job of a run may have its own."""
    best = plan.best[0]
    for index, (entry, span) in enumerate(zip(plan.of_stages, plan.job.spans, strict=True)):
        ours: StagePlan = best.stages[index]
        gained = 100 * (1 - entry.stages[index].step.total / ours.step.total)
        if gained >= _WORTH_ANOTHER_LAYOUT_PERCENT:
            at_most = "" if entry.stages[index].is_simulated else "up to "
            yield (
                f"  at length {span.seq_length} alone {describe_layout(entry.layout)} would be "
                f"{at_most}{gained:.1f} % quicker; a run's jobs may each have a layout of their own"
            )
