"""Memory of the fullest rank, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_bert.config.curriculum import StageSpan
from megatron_bert.planner.activations import block_bytes, head_bytes
from megatron_bert.planner.dealings import Dealings
from megatron_bert.planner.job import Job, Work
from megatron_bert.planner.layouts import Layout, Split
from megatron_bert.planner.rank_parts import RankParts, rank_parts

Floats = NDArray[np.float64]
Number = TypeVar("Number", float, Floats)


@dataclass(frozen=True)
class Memory(Generic[Number]):
    """Bytes of one rank at the worst moment of a step.

    Attributes:
        weights: its fp32 shard.
        gradients: fp32, whole while micro-batches are accumulated.
        optimizer: two moments.
        gathered: weights in the compute type.
        activations: of the micro-batches in flight.
        working: of what is being computed beside, a block or the head.
        logits: where those stand at that moment: with their softmax.
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
class RankNeeds:
    """What a pipeline rank needs in a stage of the curriculum, before its shards are dealt out.

    Attributes:
        part: what it holds of the model.
        accumulates: whether it takes several micro-batches a step.
        activations: of the micro-batches in flight, in bytes.
        working: of what is being computed beside.
        logits: of them.
    """

    part: RankParts
    accumulates: bool
    activations: float
    working: float
    logits: float


def memories(job: Job, needs: Sequence[RankNeeds], dealings: Dealings) -> Memory[Floats]:
    """With weights dealt out: [needs, dealings] of each part."""
    e, shards = job.element_bytes, dealings.shards[None]
    columns = zip(*(_numbers(need) for need in needs), strict=True)
    parameters, block, root, activations, working, logits, accumulates = (
        np.array(values, dtype=np.float64)[:, None] for values in columns
    )
    several = shards > 1
    shard = parameters / shards
    # With one micro-batch each unit's gradient is packed, summed and freed, and its shard remains;
    # gradients come while activations go, so that the worst moment has either these or those.
    at_once = e * block + (4 + job.reduce_bytes) * block * several
    whole = accumulates * 4.0 * parameters + (1.0 - accumulates) * at_once
    return Memory(
        weights=4.0 * shard,
        gradients=whole,
        optimizer=8.0 * shard,
        gathered=e * np.where(dealings.reshard[None], root + 2 * block, parameters),
        activations=np.maximum(activations, (1.0 - accumulates) * 4.0 * shard),
        working=np.broadcast_to(working, shard.shape),
        logits=np.broadcast_to(logits, shard.shape),
        buffers=e * block * several,
    )


def _numbers(need: RankNeeds) -> tuple[float, ...]:
    part = need.part
    return (
        part.parameters,
        part.block,
        part.root,
        need.activations,
        need.working,
        need.logits,
        need.accumulates,
    )


def rank_needs(job: Job, layout: Layout, span: StageSpan) -> list[RankNeeds]:
    """What the ranks need among which the fullest is: the first two, and the last.

    Earlier ranks have more micro-batches in flight, and the first may hold a block less.
    """
    batch, split = job.batch(layout, span), layout.split
    work = Work(job, split, layout.recompute, batch.micro_size, span)
    block = block_bytes(work)
    entry = job.element_bytes * work.tokens * work.share * job.config.model.hidden_size
    accumulates = batch.num_micro_batches > 1
    parts = rank_parts(job, split)
    needs = []
    for rank in sorted({0, min(1, split.pipeline - 1), split.pipeline - 1}):
        part = parts[rank]
        flying = in_flight_layers(split, rank, part.layers, batch.num_micro_batches)
        kept, working, logits = block.kept * flying, max(block.forward, block.backward), 0.0
        if part.has_head:
            head = head_bytes(work)
            # The final norm keeps its input. While the blocks go forward nothing of the head is
            # there; while they go backward, only the table's gradient.
            kept += entry
            working = max(block.forward, head.table + block.backward)
            if head.kept + head.table + head.logits > working:
                working, logits = head.kept + head.table, head.logits
        needs.append(RankNeeds(part, accumulates, kept, working, logits))
    return needs


def memory(job: Job, layout: Layout, span: StageSpan) -> Memory[float]:
    """Memory of the fullest pipeline rank in a stage of the curriculum."""
    found = memories(job, rank_needs(job, layout, span), Dealings.one(job, layout))
    fullest = int(found.total[:, 0].argmax())
    return Memory(
        **{field.name: float(getattr(found, field.name)[fullest, 0]) for field in fields(found)}
    )


def in_flight_layers(split: Split, rank: int, layers: int, micro_batches: int) -> float:
    """Blocks times micro-batches whose activations a rank holds at the most.

    What `parallel.schedule` has waiting for their backward pass.
    """
    if split.pipeline == 1:
        return float(layers)
    if split.virtual == 1:
        return float(layers * min(micro_batches, split.pipeline - rank))
    first = 0 if split.schedule == "zero_bubble" else rank
    ahead = 2 * (split.pipeline - 1 - first) + (split.virtual - 1) * split.pipeline + 1
    return layers / split.virtual * min(micro_batches * split.virtual, ahead)
