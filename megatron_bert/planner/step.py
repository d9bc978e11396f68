"""How long a training step takes under a layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Generic

import numpy as np

from megatron_bert.config.curriculum import StageSpan
from megatron_bert.config.parameters import RankParameters
from megatron_bert.config.pipeline_schedules import ScheduleName
from megatron_bert.parallel.actions import StageTime
from megatron_bert.planner.arrays import Floats, Number, columns
from megatron_bert.planner.compute import (
    Passes,
    Seconds,
    block_passes,
    embedding_passes,
    head_passes,
    weight_product_seconds,
)
from megatron_bert.planner.data_parallel_choices import DataParallelChoices
from megatron_bert.planner.job import Job, Work
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.network import Group
from megatron_bert.planner.pipeline_times import TimedSchedule
from megatron_bert.planner.rank_parts import layers_of_stages, rank_parts

# After this many rounds of a pipeline, each further round takes as long as the one before.
_SIMULATED_ROUNDS = 4


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by what the busiest rank spends them on.

    Attributes:
        gemm: matrix products.
        attention: softmax attention.
        elementwise: norms, activations, dropout, sums of gradients.
        host: waiting for the host.
        tensor: tensor parallelism's messages that no computation hides.
        bubble: waiting for other pipeline stages, and for messages between them.
        gather: gathering of weights that no computation hides.
        reduce: reduction of gradients that no computation hides.
        optimizer: the update, and the part of a step outside the model.
    """

    gemm: float
    attention: float
    elementwise: float
    host: float
    tensor: float
    bubble: float
    gather: float
    reduce: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class StepTerms(Generic[Number]):
    """Terms of a step's time that are common to all `DataParallelChoices`, for `total_seconds`.

    Attributes:
        busy: seconds of the busiest rank, with the least that its bubble can be.
        forward: seconds of a block.
        backward: seconds of a block.
        repeated: number of micro-batches after the first.
        layers: blocks that a pipeline rank holds.
        ranks: number of pipeline ranks that hold this number of blocks.
        other_layers: blocks of the other ranks; if there are three different numbers of blocks,
            only the first two are considered.
        other_ranks: number of these ranks, possibly 0.
    """

    busy: Number
    forward: Number
    backward: Number
    repeated: Number
    layers: Number
    ranks: Number
    other_layers: Number
    other_ranks: Number


class StepModel:
    """Predicts steps of a layout in a stage of the curriculum.

    Args:
        job: the run and its ranks.
        layout: its `replicate` is ignored, and its `reshard_after_forward` matters only for whether
            passes are recorded.
        span: the stage.
    """

    def __init__(self, job: Job, layout: Layout, span: StageSpan) -> None:
        self._job, self._layout = job, layout
        self.batch = job.batch(layout, span)
        self.work = Work(
            job, layout.split, layout.recompute, self.batch.micro_size, span, job.records(layout)
        )
        self._parts = rank_parts(job, layout.split)
        self._block = _block(self.work)
        self._embedding, self._head = _ends(self.work)
        # The rank with the most blocks, of those between the ends.
        middle = max(self._parts[1:-1], key=lambda part: part.layers, default=None)
        ends = {0: self._parts[0], len(self._parts) - 1: self._parts[-1]}
        candidates = [*ends.items(), *([] if middle is None else [(1, middle)])]
        totals = [self._total_of(part, rank) for rank, part in candidates]
        self._busiest = max(totals, key=lambda seconds: seconds.total)
        self.busy = self._busiest.total * self.batch.num_micro_batches

    def step(self, choices: DataParallelChoices, bubble: float) -> Step:
        """The predicted time of a step.

        Args:
            choices: the layout's single choice.
            bubble: the result of `least_bubble` or `simulated_bubble`.
        """
        terms = StepTerms(**columns([self.terms], np.array([0])))
        gather, reduce = data_messages(terms, choices)
        total = self._busiest * self.batch.num_micro_batches
        return Step(
            gemm=total.gemm,
            attention=total.attention,
            elementwise=total.elementwise,
            host=total.host,
            tensor=total.tensor,
            bubble=bubble,
            gather=gather.item(),
            reduce=reduce.item(),
            optimizer=choices.update.item(),
        )

    @cached_property
    def least_bubble(self) -> float:
        """Seconds that a pipeline takes at least to fill and to drain, whatever its order.

        A rank begins when a micro-batch has come through the stages before its own, and once it has
        no more gradients to send, these still go back through them.
        """
        if self._layout.split.pipeline == 1:
            return 0.0
        middle = max(self._parts[1:-1], key=lambda part: part.layers, default=self._parts[-1])
        ranks = {0, self._parts.index(middle), len(self._parts) - 1}
        return max(self._least_duration(rank) for rank in ranks) - self.busy

    def _least_duration(self, rank: int) -> float:
        layers = layers_of_stages(self._job, self._layout.split.num_stages)
        part, count = self._parts[rank], self.batch.num_micro_batches
        before = _summed([(self._block, sum(layers[:rank])), (self._embedding, min(rank, 1))])
        own = _summed(
            [(self._block, part.layers), (self._embedding, rank == 0), (self._head, part.has_head)]
        )
        fill = before.forward + rank * self.message
        drain = before.backward_input + rank * self.message
        if not self._layout.split.splits_backward:
            return fill + count * own.total + drain + before.backward_weight
        # Products for weights may come last; those of the first stage do so in any case.
        first = _summed([(self._block, layers[0]), (self._embedding, 1)]).backward_weight
        without = count * (own.forward + own.backward_input) + drain + first
        return fill + max(count * own.total, without)

    @property
    def simulated_schedules(self) -> list[tuple[ScheduleName, int, int, int]]:
        """The arguments of every `TimedSchedule` that `simulated_bubble` goes through."""
        split = self._layout.split
        return [
            (split.schedule, split.pipeline, count, split.virtual)
            for count in self._simulated_micro_batches
        ]

    @property
    def _simulated_micro_batches(self) -> list[int]:
        # Between filling and draining a pipeline repeats itself: one more round tells how long each
        # further one takes.
        count, ranks = self.batch.num_micro_batches, self._layout.split.pipeline
        most = _SIMULATED_ROUNDS * ranks
        return [count] if count <= most else [most - ranks, most]

    def simulated_bubble(self) -> float:
        """Seconds that the simulated schedule of training takes longer than the busiest rank."""
        if self._layout.split.pipeline == 1:
            return 0.0
        stages, durations = self.stage_times(), {}
        for arguments in self.simulated_schedules:
            schedule: TimedSchedule = self._job.once(
                ("schedule", *arguments), partial(TimedSchedule, *arguments)
            )
            durations[schedule.num_micro_batches] = schedule.duration(stages, self.message)
        most, count = max(durations), self.batch.num_micro_batches
        duration = durations[most]
        if most < count:
            fewer = min(durations)
            each = (duration - durations[fewer]) / (most - fewer)
            # If the pipeline is still filling, the busiest rank sets the pace in the end.
            duration += (count - most) * max(each, self.busy / count)
        return duration - self.busy

    def stage_times(self) -> list[StageTime]:
        """Seconds of each stage for a micro-batch."""
        blocks = layers_of_stages(self._job, self._layout.split.num_stages)
        times = []
        for stage, layers in enumerate(blocks):
            pieces = [(self._block, layers)]
            pieces += [(self._embedding, 1)] if stage == 0 else []
            pieces += [(self._head, 1)] if stage == len(blocks) - 1 else []
            times.append(_summed(pieces))
        return times

    def _total_of(self, part: RankParameters, rank: int) -> Seconds:
        total = self._block.total * part.layers
        if rank == 0:
            total += self._embedding.total
        return total + self._head.total if part.has_head else total

    @cached_property
    def message(self) -> float:
        """Seconds to send hidden states to the next stage."""
        work, split = self.work, self._layout.split
        size = work.job.element_bytes * work.tokens * work.share
        size *= work.job.config.model.hidden_size
        return Group(split.pipeline, split.tensor * split.data).message(work.job.machine, size)

    @cached_property
    def terms(self) -> StepTerms[float]:
        """Terms of a step's time that are common to all data-parallel choices."""
        block = self._block
        counts = list(Counter(part.layers for part in self._parts).items())
        (layers, ranks), (other_layers, other_ranks) = (*counts, (counts[0][0], 0))[:2]
        return StepTerms(
            busy=self.busy + self.least_bubble,
            forward=block.forward.total,
            backward=block.backward_input.total + block.backward_weight.total,
            repeated=self.batch.num_micro_batches - 1,
            layers=layers,
            ranks=ranks,
            other_layers=other_layers,
            other_ranks=other_ranks,
        )


def total_seconds(terms: StepTerms[Floats], choices: DataParallelChoices) -> Floats:
    """A step's seconds under each data-parallel choice, with the least that the bubble can be.

    Args:
        terms: terms of each choice's layout.
        choices: copies and shards of each layout's weights.
    """
    gather, reduce = data_messages(terms, choices)
    total: Floats = terms.busy + gather + reduce + choices.update
    return total


def data_messages(terms: StepTerms[Floats], choices: DataParallelChoices) -> tuple[Floats, Floats]:
    """Seconds of gathering weights and of reducing gradients that computation does not hide.

    Each block's all-gather overlaps with the block before it, and each reduction with the blocks
    before it; parameters outside the blocks have nothing to overlap with. In a pipeline a rank
    begins to gather when its first micro-batch arrives, so that all-gathers add up; reductions end
    at the same time.

    Args:
        terms: terms of each choice's layout, or one for all.
        choices: copies and shards of each layout's weights.
    """
    forward, backward = terms.forward, terms.backward
    again = choices.gather * choices.reshard_after_forward
    gather, reduce = choices.root_gather, np.zeros_like(again)
    counts = ((terms.layers, terms.ranks), (terms.other_layers, terms.other_ranks))
    for layers, ranks in counts:
        gather = gather + ranks * _not_hidden(layers, choices.gather, forward)
        reduce = np.maximum(reduce, _not_hidden(layers, choices.reduce + again, backward))
        gather = gather + terms.repeated * _not_hidden(layers, again, forward)
        gather = gather + terms.repeated * _not_hidden(layers, again, backward)
    return gather, reduce + choices.root_reduce


def _not_hidden(layers: Floats, message: Floats, beside: Floats) -> Floats:
    """Seconds that blocks' messages add to computation; each overlaps with the next block."""
    total: Floats = np.maximum(layers * message + beside, message + layers * beside)
    return total - layers * beside


def _summed(pieces: Iterable[tuple[Passes, int]]) -> StageTime:
    """The passes of several parts of the model, each so many times."""
    forward = backward_input = backward_weight = 0.0
    for piece, number in pieces:
        times = piece.times
        forward += number * times.forward
        backward_input += number * times.backward_input
        backward_weight += number * times.backward_weight
    return StageTime(forward, backward_input, backward_weight)


def _block(work: Work) -> Passes:
    split = work.split
    hides = not split.splits_backward
    key = (
        "block", split.tensor, split.sequence, hides, work.recompute, work.rows, work.span.index,
        work.is_recorded,
    )  # fmt: skip
    block: Passes = work.job.once(key, lambda: block_passes(work, *_tensor_messages(work, hides)))
    return block


def _ends(work: Work) -> tuple[Passes, Passes]:
    key = ("ends", work.split.tensor, work.rows, work.span.index)
    ends: tuple[Passes, Passes] = work.job.once(
        key, lambda: (embedding_passes(work), head_passes(work))
    )
    return ends


def _tensor_messages(work: Work, hides: bool) -> tuple[float, float]:
    """Seconds of a block's tensor-parallel messages that no computation hides.

    Args:
        work: the micro-batch.
        hides: whether weights' products directly follow the inputs' (zero bubble defers them).
    """
    split, machine = work.split, work.job.machine
    group = Group(split.tensor, 1)
    size = work.job.element_bytes * work.tokens * work.job.config.model.hidden_size
    gathering, summing = group.gathering(machine, size), group.sum(machine, size)
    under = weight_product_seconds(work) if hides else (0.0, 0.0)
    if not split.sequence:
        return 2 * summing, sum(max(0.0, summing - beside) for beside in under)
    # The second all-gather of an input overlaps with the products for its gradient: just as many.
    hidden = sum(2 * max(0.0, gathering - beside) for beside in under)
    return 4 * gathering, 2 * gathering + hidden
