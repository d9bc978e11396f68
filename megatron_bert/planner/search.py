"""The best layouts of a job, and what rules the others out."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_bert.config.errors import ConfigError
from megatron_bert.config.flops import row_flops
from megatron_bert.config.layout_checks import layout_problems
from megatron_bert.config.schema import Config
from megatron_bert.planner.dealings import Dealings, Floats
from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import (
    Layout,
    Recompute,
    Split,
    all_splits,
    micro_token_choices,
)
from megatron_bert.planner.machines import GIB, Machine
from megatron_bert.planner.memory import Memory, Moments, memory, rank_needs
from megatron_bert.planner.step import Step, StepModel, total_seconds

# Layouts as quick as this are alike. First come those that leave memory to what nobody predicts,
# and of them the simplest: it has the least that can be slower than is predicted.
ALIKE_PERCENT = 0.5
SCARCE_PERCENT = 5.0
# All layouts are ranked with their bubble by the formula, and the first of them, with as many more
# as are asked for, again with it simulated: a computation of a pipeline takes about 10 us.
_SIMULATED_AT_LEAST = 12
_MOST_SIMULATED_ACTIONS = 5_000
# `rank_needs` tells of so many at the most.
_MOST_RANKS = 3


@dataclass(frozen=True)
class StagePlan:
    """A layout in one stage of the curriculum.

    Attributes:
        step: seconds of a step.
        is_simulated: whether the pipeline was simulated; else its bubble is had by the formula.
        memory: of the fullest rank.
        logits: bytes of them on the rank that has the head, at whatever moment.
        tokens_per_second: slots of the global batch, surplus rows not counted.
        mfu: share of the GPUs' peak that the needed products take, attention over whole rows.
        micro_batches: of a step and rank.
        micro_rows: of a micro-batch.
        surplus_share: of computed rows that are surplus.
    """

    step: Step
    is_simulated: bool
    memory: Memory[float]
    logits: float
    tokens_per_second: float
    mfu: float
    micro_batches: int
    micro_rows: int
    surplus_share: float


@dataclass(frozen=True)
class LayoutPlan:
    """A layout over the whole curriculum.

    Attributes:
        layout: its keys.
        stages: of the curriculum, in order.
        days: of the run, without evaluation, checkpoints and time between jobs.
        gpu_hours: the same, over all GPUs.
    """

    layout: Layout
    stages: tuple[StagePlan, ...]
    days: float
    gpu_hours: float

    @property
    def fullest(self) -> StagePlan:
        """The stage that takes the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def peak_bytes(self) -> float:
        """Memory of the fullest rank in it."""
        return self.fullest.memory.total


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        job: what was planned.
        best: of each way to share the model the quickest layout that fits, in order; of those
            that are alike the simplest comes first, and last those that leave little memory.
        alternatives: for each key that can be chosen the best layout that differs from the best of
            all in it.
        of_stages: for each stage of the curriculum the layout that is the quickest in it.
        legal: layouts of the job.
        too_large: of them those that do not fit.
        smallest: the legal layout that takes the least memory.
    """

    job: Job
    best: tuple[LayoutPlan, ...]
    alternatives: tuple[tuple[str, LayoutPlan], ...]
    of_stages: tuple[LayoutPlan, ...]
    legal: int
    too_large: int
    smallest: LayoutPlan


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
        config: the run; its own layout counts for nothing.
        vocab_size: padded vocabulary.
        machine: the cluster.
        ranks: GPUs of the job.
        keep: how many of the best ways to share the model are returned.

    Raises:
        ConfigError: No layout of so many ranks is legal, or none fits; the message says why.
    """
    job = Job(config, vocab_size, machine, ranks)
    search = _Search(job)
    if not search.legal:
        problems = layout_problems(config, ranks, vocab_size)
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
    """All layouts of a job, and the quickest of them more closely.

    Layouts are numbered: those of a base (split, micro-batches, recomputation) follow one another,
    with their weights dealt out in every way. Arrays hold what is known of each.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._steps = [span.num_steps for span in job.spans]
        self._simulated: dict[tuple[object, ...], float] = {}
        self._actions_left = _MOST_SIMULATED_ACTIONS
        self._bases = list(self._all_bases())
        dealt = [Dealings.all(job, base) for base in self._bases]
        counts = [len(dealings.shards) for dealings in dealt]
        self.legal = sum(counts)
        if not self.legal:
            return
        self._base_of = np.repeat(np.arange(len(counts)), counts)
        dealings = Dealings.joined(dealt)
        self._replicate, self._reshard = dealings.replicate, dealings.reshard
        # [stages, layouts]: seconds of a step, bytes of the fullest rank.
        seconds, peaks = (
            np.array(values)
            for values in zip(
                *(self._of_stage(index, dealings) for index in range(len(self._steps))), strict=True
            )
        )
        self._of_stages = seconds
        self._seconds = np.dot(self._steps, seconds)
        self._peaks = peaks.max(axis=0)
        parts = np.array([_parts_of(base) for base in self._bases])[self._base_of]
        scarce = is_scarce(self._peaks, job.machine)
        bands = _band_of(self._seconds)
        order = np.lexsort((self._seconds, parts + self._reshard, scarce, bands))
        self.fitting = order[self._peaks[order] <= job.machine.usable_bytes]

    def best(self, keep: int) -> list[LayoutPlan]:
        """The quickest way to share the model, each with the best of all else, that fit."""
        most = max(keep, _SIMULATED_AT_LEAST)
        near: dict[Split, int] = {}
        for number in self.fitting:
            near.setdefault(self._bases[self._base_of[number]].split, number)
            if len(near) == most:
                break
        plans = [self.plan(self._layout(number)) for number in near.values()]
        bands = _band_of(np.array([plan.days for plan in plans])).tolist()

        def place(number: int) -> tuple[float, ...]:
            plan = plans[number]
            scarce = bool(is_scarce(np.array(plan.peak_bytes), self.job.machine))
            parts = _parts_of(plan.layout) + plan.layout.reshard
            return bands[number], scarce, parts, plan.days

        return [plans[number] for number in sorted(range(len(plans)), key=place)[:keep]]

    def alternatives(self, best: Layout) -> Iterator[tuple[str, LayoutPlan]]:
        """The quickest layout without each choice of the best one."""
        differs = {
            name: np.array([choice(base) != choice(best) for base in self._bases])[self._base_of]
            for name, choice in _CHOICES.items()
        }
        differs["parallel.replicate"] = self._replicate != best.replicate
        differs["parallel.reshard_after_forward"] = self._reshard != best.reshard
        for name, different in differs.items():
            others = self.fitting[different[self.fitting]]
            if len(others):
                yield name, self.plan(self._layout(others[0]))

    def best_of_stage(self, index: int) -> LayoutPlan:
        """The layout that fits and is the quickest in a stage of the curriculum."""
        quickest = self.fitting[self._of_stages[index][self.fitting].argmin()]
        return self.plan(self._layout(quickest))

    def smallest(self) -> LayoutPlan:
        """The layout that takes the least memory."""
        return self.plan(self._layout(int(self._peaks.argmin())))

    def _layout(self, number: int) -> Layout:
        base = self._bases[self._base_of[number]]
        dealt = int(self._replicate[number]), bool(self._reshard[number])
        return Layout(base.split, base.micro_tokens, base.recompute, *dealt)

    def plan(self, layout: Layout) -> LayoutPlan:
        """All about one layout."""
        stages = tuple(self._stage_plan(layout, index) for index in range(len(self.job.spans)))
        seconds = sum(
            stage.step.total * steps for stage, steps in zip(stages, self._steps, strict=True)
        )
        return LayoutPlan(layout, stages, seconds / 86400, seconds / 3600 * self.job.ranks)

    def _all_bases(self) -> Iterator[Layout]:
        """Every layout of one copy that frees no weights."""
        job = self.job
        recomputations: tuple[Recompute, ...] = ("none", "selective", "full")
        if job.has_kernel:
            # It holds no scores that could be computed again.
            recomputations = ("none", "full")
        for split in all_splits(job.config, job.ranks, job.vocab_size):
            for micro_tokens in micro_token_choices(job.config, split):
                for recompute in recomputations:
                    if split.schedule != "zero_bubble" or recompute == "none":
                        yield Layout(split, micro_tokens, recompute)

    def _of_stage(self, index: int, dealings: Dealings) -> tuple[Floats, Floats]:
        """Seconds of a step, and bytes of the fullest rank, under each layout."""
        job, span = self.job, self.job.spans[index]
        # Limits of a micro-batch that give the same rows are one case.
        numbers: dict[Hashable, int] = {}
        times: list[tuple[float, ...]] = []
        needs: list[list[tuple[float, ...]]] = []
        case_of = []
        for base in self._bases:
            key = (base.split, base.recompute, job.batch(base, span))
            if key not in numbers:
                numbers[key] = len(times)
                times.append(StepModel(job, base, span).numbers)
                of_ranks = [need.numbers() for need in rank_needs(job, base, span)]
                # As many of each: of three ranks the fullest is that of two of them, too.
                needs.append((of_ranks * _MOST_RANKS)[:_MOST_RANKS])
            case_of.append(numbers[key])
        cases = np.array(case_of)[self._base_of]
        of_times, of_needs = np.array(times, dtype=np.float64), np.array(needs, dtype=np.float64)
        seconds = total_seconds(of_times[cases].T, dealings)
        peaks = Moments(job, of_needs[cases].transpose(2, 1, 0), dealings).peaks()
        return seconds, peaks

    def _stage_plan(self, layout: Layout, index: int) -> StagePlan:
        job, span = self.job, self.job.spans[index]
        model = StepModel(job, layout, span)
        bubble, is_simulated = self._bubble(layout, index, model)
        step = model.step(Dealings.one(job, layout), bubble)
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
        """Simulated, while that is worth its time."""
        key = (layout.split, layout.recompute, layout.micro_tokens, index)
        if key not in self._simulated:
            actions = model.simulated_actions
            if actions > self._actions_left:
                return model.estimated_bubble, False
            self._actions_left -= actions
            self._simulated[key] = model.simulated_bubble()
        return self._simulated[key], True


def _band_of(seconds: Floats) -> NDArray[np.int64]:
    """How many times `ALIKE_PERCENT` each lies above the quickest."""
    wide = math.log1p(ALIKE_PERCENT / 100)
    bands: NDArray[np.int64] = (np.log(seconds / seconds.min()) / wide).astype(np.int64)
    return bands


def is_scarce(peaks: Floats, machine: Machine) -> NDArray[np.bool_]:
    """Whether so little memory is left that a prediction's error may take it."""
    scarce: NDArray[np.bool_] = peaks > (1 - SCARCE_PERCENT / 100) * machine.usable_bytes
    return scarce


def _parts_of(layout: Layout) -> float:
    """How far a layout is from the simplest: how often the model is halved, and what is beside."""
    split = layout.split
    halves = math.log2(split.tensor) + math.log2(split.num_stages)
    return halves + split.sequence + (layout.recompute != "none")


# What can be chosen of a base.
_CHOICES: dict[str, Callable[[Layout], object]] = {
    "parallel.tensor": lambda layout: layout.split.tensor,
    "parallel.pipeline": lambda layout: layout.split.pipeline,
    "parallel.pipeline_schedule": lambda layout: (layout.split.schedule, layout.split.virtual),
    "parallel.sequence": lambda layout: layout.split.sequence,
    "batch.micro_tokens": lambda layout: layout.micro_tokens,
    "recompute": lambda layout: layout.recompute,
}
