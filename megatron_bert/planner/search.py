"""Searching for the best layouts of a job."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np

from megatron_bert.config.flops import row_flops
from megatron_bert.config.layout_checks import layout_problems
from megatron_bert.config.rank_layout import without_layout
from megatron_bert.config.schema import Config, Recompute
from megatron_bert.errors import ConfigError
from megatron_bert.planner.arrays import Floats, Integers, columns
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
from megatron_bert.planner.ordering import in_bands, is_scarce, parts_of
from megatron_bert.planner.pipeline_times import ARRANGING
from megatron_bert.planner.plan import LayoutPlan, Plan, StagePlan
from megatron_bert.planner.step import StepModel, StepTerms, total_seconds

# A pipeline is simulated once its layout would be the next best with the least bubble that it can
# have. The ranking may go through so many computations for this, at about 0.5 us each, and so may
# the rest of a plan; pipelines left over count with their least bubble, and are marked.
_MOST_SIMULATED_ACTIONS = 5_000_000
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
        tight=search.quicker_with_little_left(best[0]),
    )


class _Search:
    """Evaluates all layouts of a job, and the fastest ones in more detail.

    Layouts are numbered: the layouts of a base (split, micro-batches, recomputation) are
    consecutive, one for each of its data-parallel choices. Arrays have an element for each layout.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._steps = [span.num_steps for span in job.spans]
        # Bubbles of bases, by stage of the curriculum; None if a simulation would take too long.
        self._bubbles: dict[Layout, list[float] | None] = {}
        self._arranged: set[Hashable] = set()
        self._actions_left = 0
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
        # With the least bubbles, until a base's are simulated.
        self._of_stages = seconds
        self._seconds = np.dot(self._steps, seconds)
        self._peaks = peaks.max(axis=0)
        self._parts = np.array([parts_of(base) for base in self._bases])[self._base_of]
        self._parts += self._reshard_after_forward
        self.fitting = np.flatnonzero(self._peaks <= job.machine.usable_bytes)

    def best(self, keep: int) -> list[LayoutPlan]:
        """The fastest fitting ways to share the model, each with the best of all other choices.

        Those that leave little memory come last. The first ones are the same however many are kept.
        """
        self._refill_actions()
        found: dict[Split, int] = {}
        for numbers in self._by_memory(self.fitting):
            quickest = self._quickest(numbers, self._seconds, found)
            for band in in_bands(quickest, lambda number: self._seconds[number]):
                for number in sorted(band, key=lambda number: self._parts[number]):
                    found.setdefault(self._base(number).split, number)
                if len(found) >= keep:
                    break
            if len(found) >= keep:
                break
        return [self.plan(self._layout(number)) for number in list(found.values())[:keep]]

    def alternatives(self, best: Layout) -> Iterator[tuple[str, LayoutPlan]]:
        """Yield, for each choice of the best layout, the fastest layout that differs in it."""
        self._refill_actions()
        differs = {
            name: np.array([choice(base) != choice(best) for base in self._bases])[self._base_of]
            for name, choice in _CHOICES.items()
        }
        differs["parallel.replicate"] = self._replicate != best.replicate
        differs["parallel.reshard_after_forward"] = (
            self._reshard_after_forward != best.reshard_after_forward
        )
        for name, different in differs.items():
            others = self.fitting[different[self.fitting]]
            if len(others):
                yield name, self._first(others, self._seconds)

    def quicker_with_little_left(self, best: LayoutPlan) -> LayoutPlan | None:
        """The fastest layout that leaves little memory, if it is faster than the best one.

        None if the best one leaves little as well, as then all do.
        """
        roomy, scarce = self._by_memory(self.fitting)
        if not len(scarce) or not len(roomy):
            return None
        found = self.plan(self._layout(next(self._quickest(scarce, self._seconds))))
        return found if found.days < best.days else None

    def best_of_stage(self, index: int) -> LayoutPlan:
        """The fastest fitting layout in a stage of the curriculum."""
        return self._first(self.fitting, self._of_stages[index])

    def smallest(self) -> LayoutPlan:
        """The layout that takes the least memory."""
        return self.plan(self._layout(int(self._peaks.argmin())))

    def _first(self, numbers: Integers, seconds: Floats) -> LayoutPlan:
        """The fastest of some layouts, of those that leave memory if there are such."""
        roomy, scarce = self._by_memory(numbers)
        quickest = self._quickest(roomy if len(roomy) else scarce, seconds)
        return self.plan(self._layout(next(quickest)))

    def _by_memory(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Layouts that leave memory for the prediction's error, and those that leave little."""
        scarce = is_scarce(self._peaks[numbers], self.job.machine)
        return numbers[~scarce], numbers[scarce]

    def _quickest(
        self, numbers: Integers, seconds: Floats, passed: Container[Split] = ()
    ) -> Iterator[int]:
        """Yield layouts, the fastest first.

        Args:
            numbers: of the layouts.
            seconds: of each layout, `self._seconds` or a row of `self._of_stages`; layouts that
                could be next are simulated, which only increases them.
            passed: splits that need not be yielded any more.
        """
        waiting: list[tuple[float, int]] = []
        least = seconds[numbers]
        for place in least.argsort(kind="stable").tolist():
            while waiting and waiting[0][0] <= least[place]:
                yield heapq.heappop(waiting)[1]
            number = int(numbers[place])
            if self._base(number).split not in passed:
                self._simulate(self._base_of[number])
                heapq.heappush(waiting, (float(seconds[number]), number))
        while waiting:
            yield heapq.heappop(waiting)[1]

    def _refill_actions(self) -> None:
        """Allow as many simulations as at first, also of bases for which they did not suffice."""
        self._actions_left = _MOST_SIMULATED_ACTIONS
        self._bubbles = {base: found for base, found in self._bubbles.items() if found is not None}

    def _simulate(self, base: int) -> None:
        """Count a base's layouts with the bubbles that its pipeline has, while it is worth it."""
        layout = self._bases[base]
        if layout.split.pipeline == 1 or layout in self._bubbles:
            return
        models = [StepModel(self.job, layout, span) for span in self.job.spans]
        of_base = np.flatnonzero(self._base_of == base)
        bubbles = self._bubbles[layout] = self._simulated_bubbles(models)
        for index, (model, bubble) in enumerate(zip(models, bubbles or (), strict=False)):
            more = bubble - model.least_bubble
            self._of_stages[index, of_base] += more
            self._seconds[of_base] += self._steps[index] * more

    def _simulated_bubbles(self, models: Sequence[StepModel]) -> list[float] | None:
        """Simulate a layout's stages of the curriculum, if that does not take too long."""
        schedules = [schedule for model in models for schedule in model.simulated_schedules]
        actions = sum(3 * math.prod(numbers) for _, *numbers in schedules)
        new = set(schedules) - self._arranged
        actions += ARRANGING * sum(3 * math.prod(numbers) for _, *numbers in new)
        if actions > self._actions_left:
            return None
        self._actions_left -= actions
        self._arranged |= new
        return [model.simulated_bubble() for model in models]

    def _layout(self, number: int) -> Layout:
        return replace(
            self._base(number),
            replicate=int(self._replicate[number]),
            reshard_after_forward=bool(self._reshard_after_forward[number]),
        )

    def _base(self, number: int) -> Layout:
        base: Layout = self._bases[self._base_of[number]]
        return base

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
        base = replace(layout, replicate=1, reshard_after_forward=False)
        bubbles = self._bubbles.get(base)
        bubble = model.least_bubble if bubbles is None else bubbles[index]
        step = model.step(DataParallelChoices.one(job, layout), bubble)
        flops = span.global_size * row_flops(
            job.config.model, job.vocab_size, span.seq_length, span.masked_slots
        )
        peak = job.machine.peak(job.config.precision.compute) * job.ranks
        return StagePlan(
            step=step,
            is_simulated=layout.split.pipeline == 1 or bubbles is not None,
            memory=memory(job, layout, span),
            logits=rank_needs(job, layout, span)[-1].logits,
            tokens_per_second=span.slots_per_step / step.total,
            mfu=flops / step.total / peak,
            micro_batches=model.batch.num_micro_batches,
            micro_rows=model.batch.micro_size,
            surplus_share=model.batch.surplus_share,
        )


# The choices that make up a base.
_CHOICES: dict[str, Callable[[Layout], object]] = {
    "parallel.tensor": lambda layout: layout.split.tensor,
    "parallel.pipeline": lambda layout: layout.split.pipeline,
    "parallel.pipeline_schedule": lambda layout: (layout.split.schedule, layout.split.virtual),
    "parallel.sequence": lambda layout: layout.split.sequence,
    "batch.micro_tokens": lambda layout: layout.micro_tokens,
    "recompute": lambda layout: layout.recompute,
}
