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
        is_simulated: whether a pipeline was simulated; otherwise its bubble is the least possible.
        memory: of the fullest rank.
        logits: peak bytes of the logits, on the rank with the head.
        tokens_per_second: slots of the global batch, without surplus rows.
        mfu: share of the GPUs' peak that the needed products take, with attention over whole rows.
        micro_batches: per step and rank.
        micro_rows: rows of a micro-batch.
        surplus_share: share of the computed rows that are surplus.
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
        days: duration of the run, without evaluation, checkpoints and time between jobs.
        gpu_hours: the same, summed over all GPUs.
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
    def is_simulated(self) -> bool:
        """Whether no stage's pipeline may take longer than is said."""
        return all(stage.is_simulated for stage in self.stages)

    @property
    def peak_bytes(self) -> float:
        """Memory of the fullest rank in the fullest stage."""
        return self.fullest.memory.total


@dataclass(frozen=True)
class Plan:
    """The result of a search.

    Attributes:
        job: what was planned.
        best: the fastest fitting layout of each way to share the model, in order; of about equally
            fast ones the simplest comes first, and those that leave little memory come last.
        alternatives: for each key that can be chosen, the fastest layout that differs from the
            overall best in it; one that leaves little memory only if all do.
        of_stages: for each stage of the curriculum, the fastest layout in it.
        legal: number of legal layouts of the job.
        too_large: number of legal layouts that do not fit.
        smallest: the legal layout that takes the least memory.
        tight: the fastest layout that fits but leaves little memory, if it is faster than the best.
    """

    job: Job
    best: tuple[LayoutPlan, ...]
    alternatives: tuple[tuple[str, LayoutPlan], ...]
    of_stages: tuple[LayoutPlan, ...]
    legal: int
    too_large: int
    smallest: LayoutPlan
    tight: LayoutPlan | None = None
