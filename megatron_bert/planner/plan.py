"""A plan: layouts, each with its time and its memory in every stage of the curriculum."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.memory import Memory
from megatron_bert.planner.step import Step


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
        gpu_hours: of the run, over all GPUs.
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
        too_large: legal layouts that do not fit.
        smallest: the legal layout that takes the least memory.
    """

    job: Job
    best: tuple[LayoutPlan, ...]
    alternatives: tuple[tuple[str, LayoutPlan], ...]
    of_stages: tuple[LayoutPlan, ...]
    legal: int
    too_large: int
    smallest: LayoutPlan
