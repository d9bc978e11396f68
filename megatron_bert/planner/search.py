"""Searching for the best layouts of a job."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import get_args

import numpy as np

from megatron_bert.config.flops import row_flops
from megatron_bert.config.layout_checks import layout_problems
from megatron_bert.config.rank_layout import without_layout
from megatron_bert.config.schema import Config, Recompute
from megatron_bert.errors import ConfigError
from megatron_bert.planner.arrays import Floats, columns
from megatron_bert.planner.data_parallel_choices import DataParallelChoices
from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import (
    Layout,
    Split,
    all_splits,
    micro_token_choices,
)
from megatron_bert.planner.machines import GIB, Machine
from megatron_bert.planner.memory import Moments, RankNeeds, memory, rank_needs
from megatron_bert.planner.ordering import band_of, is_scarce, parts_of
from megatron_bert.planner.plan import LayoutPlan, Plan, StagePlan
from megatron_bert.planner.step import StepModel, StepTerms, total_seconds

# All layouts are ranked with the bubble by the formula. The first of them (this many, or as many as
# are asked for) are then ranked again with the bubble simulated, which takes about 10 us for each
# computation of a pipeline.
_SIMULATED_AT_LEAST = 12
_MOST_SIMULATED_ACTIONS = 5_000
# The most ranks that `rank_needs` returns.
_MOST_RANKS = 3


def make_plan(
    config: Config,
    vocab_size: int,
    machine: Machine,
    ranks: int,
    *,
    keep: int = 10,
) -> Plan:
    """Rank every legal layout by the predicted time of the whole curriculum.

    Args:
        config: the run; its own layout is ignored.
        vocab_size: padded vocabulary.
        machine: the cluster.
        ranks: GPUs of the job.
        keep: how many of the best ways to share the model are returned.

    Raises:
        ConfigError: No layout of that many ranks is legal, or none fits; the message says why.
    """
    job = Job(config, vocab_size, machine, ranks)
    search = _Search(job)
    if not search.legal:
        problems = layout_problems(without_layout(config), ranks, vocab_size)
        raise ConfigError("\n".join(problems) or f"no layout of {ranks} ranks is legal; use others")
    if not len(search.fitting):
        smallest = search.smallest()
        raise ConfigError(
            f"none of {search.legal:,} layouts of {ranks} x {machine.gpu.name} fits: the "
            f"smallest takes {smallest.peak_bytes / GIB:.1f} GiB a GPU, and "
            f"{machine.usable_bytes / GIB:.1f} are free; use more or larger GPUs"
        )
    best = search.best(keep)
    return Plan(
        job=job,
        best=tuple(best),
        alternatives=tuple(search.alternatives(best[0].layout)),
        of_stages=tuple(search.best_of_stage(index) for index in range(len(job.spans))),
        legal=search.legal,
        too_large=search.legal - len(search.fitting),
        smallest=search.smallest(),
    )


class _Search:
    """Evaluates all layouts of a job, and the fastest ones in more detail.

    Layouts are numbered: the layouts of a base (split, micro-batches, recomputation) are
    consecutive, one for each of its data-parallel choices. Arrays have an element for each layout.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._steps = [span.num_steps for span in job.spans]
        self._simulated: dict[tuple[object, ...], float] = {}
        self._actions_left = _MOST_SIMULATED_ACTIONS
        self._bases = list(self._all_bases())
        of_bases = [DataParallelChoices.all(job, base) for base in self._bases]
        counts = [len(choices.shards) for choices in of_bases]
        self.legal = sum(counts)
        if not self.legal:
            return
        self._base_of = np.repeat(np.arange(len(counts)), counts)
        choices = DataParallelChoices.joined(of_bases)
        self._replicate = choices.replicate
        self._reshard_after_forward = choices.reshard_after_forward
        # [stages, layouts]: seconds of a step, bytes of the fullest rank.
        seconds, peaks = (
            np.array(values)
            for values in zip(
                *(self._of_stage(index, choices) for index in range(len(self._steps))), strict=True
            )
        )
        self._of_stages = seconds
        self._seconds = np.dot(self._steps, seconds)
        self._peaks = peaks.max(axis=0)
        parts = np.array([parts_of(base) for base in self._bases])[self._base_of]
        scarce = is_scarce(self._peaks, job.machine)
        bands = band_of(self._seconds)
        order = np.lexsort((self._seconds, parts + self._reshard_after_forward, scarce, bands))
        self.fitting = order[self._peaks[order] <= job.machine.usable_bytes]

    def best(self, keep: int) -> list[LayoutPlan]:
        """The fastest fitting ways to share the model, each with the best of all other choices."""
        plans = self._planned(self.fitting, max(keep, _SIMULATED_AT_LEAST))
        bands = band_of(np.array([plan.days for plan in plans])).tolist()

        def place(number: int) -> tuple[float, ...]:
            plan = plans[number]
            scarce = bool(is_scarce(np.array(plan.peak_bytes), self.job.machine))
            parts = parts_of(plan.layout) + plan.layout.reshard_after_forward
            return bands[number], scarce, parts, plan.days

        return [plans[number] for number in sorted(range(len(plans)), key=place)[:keep]]

    def alternatives(self, best: Layout) -> Iterator[tuple[str, LayoutPlan]]:
        """Yield, for each choice of the best layout, the fastest layout that differs in it."""
        differs = {
            name: np.array([choice(base) != choice(best) for base in self._bases])[self._base_of]
            for name, choice in _CHOICES.items()
        }
        differs["parallel.replicate"] = self._replicate != best.replicate
        differs["parallel.reshard_after_forward"] = (
            self._reshard_after_forward != best.reshard_after_forward
        )
        for name, different in differs.items():
            others = self._planned(self.fitting[different[self.fitting]], _SIMULATED_AT_LEAST)
            if others:
                yield name, min(others, key=lambda plan: plan.days)

    def _planned(self, numbers: Iterable[int], most: int) -> list[LayoutPlan]:
        """The first layouts of the first `most` different splits, planned in full."""
        near: dict[Split, int] = {}
        for number in numbers:
            near.setdefault(self._bases[self._base_of[number]].split, number)
            if len(near) == most:
                break
        return [self.plan(self._layout(number)) for number in near.values()]

    def best_of_stage(self, index: int) -> LayoutPlan:
        """The fastest fitting layout in a stage of the curriculum."""
        quickest = self.fitting[self._of_stages[index][self.fitting].argmin()]
        return self.plan(self._layout(quickest))

    def smallest(self) -> LayoutPlan:
        """The layout that takes the least memory."""
        return self.plan(self._layout(int(self._peaks.argmin())))

    def _layout(self, number: int) -> Layout:
        base: Layout = self._bases[self._base_of[number]]
        return replace(
            base,
            replicate=int(self._replicate[number]),
            reshard_after_forward=bool(self._reshard_after_forward[number]),
        )

    def plan(self, layout: Layout) -> LayoutPlan:
        """The full plan of one layout."""
        stages = tuple(self._stage_plan(layout, index) for index in range(len(self.job.spans)))
        seconds = sum(
            stage.step.total * steps for stage, steps in zip(stages, self._steps, strict=True)
        )
        return LayoutPlan(layout, stages, seconds / 86400, seconds / 3600 * self.job.ranks)

    def _all_bases(self) -> Iterator[Layout]:
        """Every layout with one copy of the weights and without freeing them."""
        job = self.job
        recomputations: tuple[Recompute, ...] = get_args(Recompute)
        if job.has_kernel:
            # The kernel stores no scores that could be recomputed.
            recomputations = ("none", "full")
        for split in all_splits(job.config, job.ranks, job.vocab_size):
            for micro_tokens in micro_token_choices(job.spans, split):
                for recompute in recomputations:
                    if not split.splits_backward or recompute == "none":
                        yield Layout(split, micro_tokens, recompute)

    def _of_stage(self, index: int, choices: DataParallelChoices) -> tuple[Floats, Floats]:
        """Seconds of a step, and bytes of the fullest rank, under each layout."""
        job, span = self.job, self.job.spans[index]
        # Micro-batch limits that give the same rows are one case.
        numbers: dict[Hashable, int] = {}
        terms: list[StepTerms[float]] = []
        needs: list[RankNeeds[float]] = []
        # Both with weights kept and with weights freed; the latter may rule out recorded passes.
        cases_of = []
        for base in self._bases:
            batch, cases_of_base = job.batch(base, span), []
            for layout in (base, replace(base, reshard_after_forward=True)):
                key = (base.split, base.recompute, batch, job.records(layout))
                if key not in numbers:
                    numbers[key] = len(terms)
                    terms.append(StepModel(job, layout, span).terms)
                    # Repeated to the same number for each case, which leaves the maximum unchanged.
                    needs += (rank_needs(job, base, span) * _MOST_RANKS)[:_MOST_RANKS]
                cases_of_base.append(numbers[key])
            cases_of.append(cases_of_base)
        cases = np.array(cases_of)[self._base_of, self._reshard_after_forward.astype(np.int64)]
        ranks = _MOST_RANKS * cases + np.arange(_MOST_RANKS)[:, None]
        seconds = total_seconds(StepTerms(**columns(terms, cases)), choices)
        peaks = Moments(job, RankNeeds(**columns(needs, ranks)), choices).peaks()
        return seconds, peaks

    def _stage_plan(self, layout: Layout, index: int) -> StagePlan:
        job, span = self.job, self.job.spans[index]
        model = StepModel(job, layout, span)
        bubble, is_simulated = self._bubble(layout, index, model)
        step = model.step(DataParallelChoices.one(job, layout), bubble)
        flops = span.global_size * row_flops(
            job.config.model, job.vocab_size, span.seq_length, span.masked_slots
        )
        peak = job.machine.peak(job.config.precision.compute) * job.ranks
        return StagePlan(
            step=step,
            is_simulated=is_simulated,
            memory=memory(job, layout, span),
            logits=rank_needs(job, layout, span)[-1].logits,
            tokens_per_second=span.slots_per_step / step.total,
            mfu=flops / step.total / peak,
            micro_batches=model.batch.num_micro_batches,
            micro_rows=model.batch.micro_size,
            surplus_share=model.batch.surplus_share,
        )

    def _bubble(self, layout: Layout, index: int, model: StepModel) -> tuple[float, bool]:
        """The bubble, and whether it is simulated, which is done while it is worth its time."""
        key = (layout.split, layout.recompute, layout.micro_tokens, index)
        if key not in self._simulated:
            actions = model.simulated_actions
            if actions > self._actions_left:
                return model.estimated_bubble, False
            self._actions_left -= actions
            self._simulated[key] = model.simulated_bubble()
        return self._simulated[key], True


# The choices that make up a base.
_CHOICES: dict[str, Callable[[Layout], object]] = {
    "parallel.tensor": lambda layout: layout.split.tensor,
    "parallel.pipeline": lambda layout: layout.split.pipeline,
    "parallel.pipeline_schedule": lambda layout: (layout.split.schedule, layout.split.virtual),
    "parallel.sequence": lambda layout: layout.split.sequence,
    "batch.micro_tokens": lambda layout: layout.micro_tokens,
    "recompute": lambda layout: layout.recompute,
}
