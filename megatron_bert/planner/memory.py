"""Memory of the fullest rank, by what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import reduce
from typing import Generic

import numpy as np

from megatron_bert.config.curriculum import StageSpan
from megatron_bert.parallel.schedule import most_in_flight
from megatron_bert.planner import muon
from megatron_bert.planner.activations import HeadBytes, block_bytes, head_bytes
from megatron_bert.planner.arrays import Floats, Number, columns
from megatron_bert.planner.data_parallel_choices import DataParallelChoices
from megatron_bert.planner.job import Job, Work
from megatron_bert.planner.layouts import Layout, Split
from megatron_bert.planner.rank_parts import rank_parts


@dataclass(frozen=True)
class Memory(Generic[Number]):
    """Bytes of one rank at the worst moment of a step.

    Attributes:
        weights: its fp32 shard.
        gradients: fp32, unsharded while micro-batches are accumulated.
        optimizer: two moments; for Muon's matrices one.
        gathered: weights in the compute dtype.
        activations: of the micro-batches in flight.
        working: additional memory of the block or head being computed.
        logits: with their softmax, if there are any at that moment.
        buffers: of messages.
    """

    weights: Number
    gradients: Number
    optimizer: Number
    gathered: Number
    activations: Number
    working: Number
    logits: Number
    buffers: Number

    @property
    def total(self) -> Number:
        """All of it."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.gathered
            + self.activations
            + self.working
            + self.logits
            + self.buffers
        )


@dataclass(frozen=True)
class RankNeeds(Generic[Number]):
    """What a pipeline rank needs in a stage of the curriculum, before data-parallel sharding.

    Memory is in bytes.

    Attributes:
        parameters: of the rank, including all its data-parallel ranks' shards.
        root: parameters outside the blocks.
        block: parameters of a block.
        matrices: parameters of the blocks' matrices.
        alike: parameters of the blocks' matrices of one shape.
        owners: ranks that hold parts of its blocks.
        accumulates: 1 if it takes several micro-batches a step, else 0.
        activations: of the micro-batches in flight.
        of_block: the part of these that belongs to one block and micro-batch.
        forward: additional, during a block's forward pass.
        backward: additional, during a block's backward pass.
        table: the decoder's gradient, held until the embeddings' backward pass is done.
        head: additional, while the head computes, without its logits.
        logits: of the head.
    """

    parameters: Number
    root: Number
    block: Number
    matrices: Number
    alike: Number
    owners: Number
    accumulates: Number
    activations: Number
    of_block: Number
    forward: Number
    backward: Number
    table: Number
    head: Number
    logits: Number


class Moments:
    """The moments of a step that may take the most memory; each part is [needs, choices].

    Args:
        job: the run.
        needs: of the candidates for the fullest rank, [needs, choices or 1].
        choices: copies and shards of each layout's weights.
    """

    def __init__(self, job: Job, needs: RankNeeds[Floats], choices: DataParallelChoices) -> None:
        self._job, self._needs, self._choices = job, needs, choices
        self._shards = choices.shards.astype(np.float64)
        self._several = choices.shards > 1
        # With a single data-parallel rank nothing is reduced, and sums stay in fp32.
        shares = choices.shards * choices.replicate > 1
        self._reduced = np.where(shares, float(job.reduce_bytes), 4.0)
        # Recorded passes keep sums of gradients even for a single micro-batch.
        self._records = choices.recorded.astype(np.float64)
        self._accumulates = np.maximum(self._needs.accumulates, self._records)
        self._once = 1.0 - self._accumulates
        parameters, block = self._needs.parameters, self._needs.block
        self._gathered = job.element_bytes * np.where(
            choices.reshard_after_forward, self._needs.root + 2 * block, parameters
        )
        # Gathered weights keep their memory from step to step, unless each block frees its own.
        self._kept = job.element_bytes * np.where(choices.reshard_after_forward, 0.0, parameters)
        # Unsharded gradients, if micro-batches are accumulated before ranks reduce them.
        self._sums = self._accumulates * self._reduced * parameters
        self._weights = 4.0 * parameters / self._shards
        saved = 4.0 * self._needs.matrices if muon.is_used(job) else 0.0
        self._optimizer = (8.0 * parameters - saved) / self._shards
        self._buffers = job.element_bytes * block * self._several * self._accumulates
        # Graphs keep the peak memory of a pass: activations and everything else.
        passes = self._needs.activations + np.maximum(
            np.maximum(self._needs.forward, self._needs.table + self._needs.backward),
            self._needs.head + self._needs.logits,
        )
        self._recorded = self._records * passes

    def peaks(self) -> Floats:
        """Bytes of the fullest rank under each choice."""
        totals = (moment.total.max(axis=0) for moment in self.all())
        return reduce(np.maximum, totals)

    def all(self) -> Iterator[Memory[Floats]]:
        """Yield every moment that may be the worst."""
        yield self._forward()
        yield self._head()
        yield self._backward()
        yield self._first_reduction()
        yield self._last_reduction()
        if muon.is_used(self._job):
            yield self._update()

    def _forward(self) -> Memory[Floats]:
        """The last block's forward pass."""
        return self._moment(self._sums, self._needs.forward)

    def _head(self) -> Memory[Floats]:
        """The head's forward and backward pass."""
        return self._moment(self._sums, self._needs.head, logits=self._needs.logits)

    def _backward(self) -> Memory[Floats]:
        """The first block in backward order has computed its gradients."""
        fresh = self._once * self._job.element_bytes * self._needs.block
        return self._moment(self._sums + fresh, self._needs.table + self._needs.backward)

    # A single micro-batch's gradients are packed, summed and freed unit by unit. By then a unit's
    # activations are freed; gradient shards grow as activations shrink, so that the first or the
    # last unit is the worst.

    def _first_reduction(self) -> Memory[Floats]:
        """A block's gradients are reduced, while the other blocks' activations are still held."""
        e, block = self._job.element_bytes, self._needs.block
        packed = e + self._several * self._reduced + 4.0 / self._shards
        return self._moment(
            self._sums + self._once * packed * block,
            self._once * self._needs.table,
            activations=self._needs.activations - self._once * self._needs.of_block,
        )

    def _last_reduction(self) -> Memory[Floats]:
        """The gradients outside the blocks are reduced, last of all."""
        e, root = self._job.element_bytes, self._needs.root
        shards = 4.0 * self._needs.parameters / self._shards
        packed = (e + self._several * self._reduced) * root
        return self._moment(
            # Recorded passes keep their sums, in addition to the reduced gradients.
            np.maximum(self._sums, self._once * (shards + packed))
            + self._records * self._several * (shards + packed),
            0.0 * root,
            activations=self._recorded,
            gathered=np.maximum(self._kept, e * root),
        )

    def _update(self) -> Memory[Floats]:
        """Muon updates the weights; gradients are sharded."""
        working = muon.working_bytes(
            self._job,
            self._needs.matrices,
            self._needs.alike,
            self._needs.owners,
            self._choices.replicate.astype(np.float64),
            self._shards,
        )
        kept = self._records * self._several * self._sums
        return self._moment(
            self._weights + kept, working, activations=self._recorded, gathered=self._kept
        )

    def _moment(
        self,
        gradients: Floats,
        working: Floats,
        *,
        activations: Floats | None = None,
        gathered: Floats | None = None,
        logits: Floats | float = 0.0,
    ) -> Memory[Floats]:
        nothing = np.zeros_like(self._weights)
        return Memory(
            weights=self._weights,
            gradients=gradients + nothing,
            optimizer=self._optimizer,
            gathered=(self._gathered if gathered is None else gathered) + nothing,
            activations=(self._needs.activations if activations is None else activations) + nothing,
            working=working + nothing,
            logits=logits + nothing,
            buffers=self._buffers,
        )


def rank_needs(job: Job, layout: Layout, span: StageSpan) -> list[RankNeeds[float]]:
    """Needs of the pipeline ranks that may be the fullest: the first two, and the last.

    Earlier ranks have more micro-batches in flight, and the first may hold a block less.
    """
    batch, split = job.batch(layout, span), layout.split
    work = Work(job, split, layout.recompute, batch.micro_size, span)
    block = block_bytes(work)
    entry = job.element_bytes * work.tokens * work.share * job.config.model.hidden_size
    parts = rank_parts(job, split)
    needs = []
    for rank in sorted({0, min(1, split.pipeline - 1), split.pipeline - 1}):
        part = parts[rank]
        kept = block.kept * in_flight_layers(split, rank, part.layers, batch.num_micro_batches)
        head = head_bytes(work) if part.has_head else HeadBytes(0.0, 0.0, 0.0)
        needs.append(
            RankNeeds(
                parameters=part.total,
                root=part.root,
                block=part.block,
                matrices=part.matrices,
                alike=part.layers * muon.elements_alike(job),
                owners=split.tensor * split.data,
                accumulates=float(batch.num_micro_batches > 1),
                # The final norm keeps its input.
                activations=kept + entry * part.has_head,
                of_block=block.kept,
                forward=block.forward,
                backward=block.backward,
                table=head.table,
                head=head.kept + head.table,
                logits=head.logits,
            )
        )
    return needs


def memory(job: Job, layout: Layout, span: StageSpan) -> Memory[float]:
    """Memory of the fullest pipeline rank in a stage of the curriculum, at its worst moment."""
    of_ranks = rank_needs(job, layout, span)
    needs = RankNeeds(**columns(of_ranks, np.arange(len(of_ranks))[:, None]))
    moments = list(Moments(job, needs, DataParallelChoices.one(job, layout)).all())
    worst = max(moments, key=lambda moment: moment.total.max())
    rank = int(worst.total[:, 0].argmax())
    return Memory(
        **{field.name: float(getattr(worst, field.name)[rank, 0]) for field in fields(worst)}
    )


def in_flight_layers(split: Split, rank: int, layers: int, micro_batches: int) -> float:
    """The most blocks, times micro-batches, whose activations a rank holds at once.

    These are what `parallel.schedule` has waiting for the backward pass.
    """
    if split.pipeline == 1:
        return float(layers)
    # Where backward passes are split, every rank may hold as many as rank 0.
    limiting = 0 if split.splits_backward else rank
    most = most_in_flight(split.pipeline, split.virtual, limiting)
    return layers / split.virtual * min(micro_batches * split.virtual, most)
