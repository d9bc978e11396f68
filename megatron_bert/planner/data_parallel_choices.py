"""Every choice of `replicate` and `reshard_after_forward` for a split, and the time of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from megatron_bert.config.parameters import RankParameters
from megatron_bert.config.remedies import divisors
from megatron_bert.planner import muon
from megatron_bert.planner.arrays import Floats
from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.network import Group
from megatron_bert.planner.rank_parts import rank_parts


@dataclass(frozen=True)
class DataParallelChoices:
    """Ways to store weights on data-parallel ranks: an array per attribute, an element per way.

    Attributes:
        replicate: copies of the weights.
        shards: ranks over which a copy is sharded.
        reshard_after_forward: whether weights are gathered for every pass.
        recorded: whether passes are recorded.
        gather: seconds to gather a block's weights.
        reduce: seconds to reduce a block's gradients, over shards and copies.
        root_gather: seconds to gather the weights outside the blocks, summed over pipeline ranks.
        root_reduce: seconds to reduce the gradients outside the blocks on the rank with the most of
            them, and the gradients of which several ranks hold parts.
        update: seconds for AdamW or Muon, the gradients' norm, copies into and out of messages, and
            the constant rest of a step.
    """

    replicate: NDArray[np.int64]
    shards: NDArray[np.int64]
    reshard_after_forward: NDArray[np.bool_]
    recorded: NDArray[np.bool_]
    gather: Floats
    reduce: Floats
    root_gather: Floats
    root_reduce: Floats
    update: Floats

    @classmethod
    def all(cls, job: Job, base: Layout) -> DataParallelChoices:
        """Every number of copies, with and without freeing weights after forward."""
        split = base.split
        # The number of stages per rank changes its blocks by at most one, and no message.
        key = ("data parallel", split.tensor, split.sequence, split.pipeline)

        def make() -> DataParallelChoices:
            # Training cannot free weights if recorded passes are required.
            ways = (False,) if job.config.compile.cuda_graphs is True else (False, True)
            return cls._of(
                job,
                [
                    replace(base, replicate=replicate, reshard_after_forward=frees)
                    for replicate in divisors(split.data)
                    for frees in (ways if split.data > replicate else (False,))
                ],
            )

        found: DataParallelChoices = job.once(key, make)
        return found

    @classmethod
    def one(cls, job: Job, layout: Layout) -> DataParallelChoices:
        """A layout's own choice alone."""
        return cls._of(job, [layout])

    @classmethod
    def joined(cls, several: Sequence[DataParallelChoices]) -> DataParallelChoices:
        """The choices of several, concatenated."""
        return cls(
            **{
                field.name: np.concatenate([getattr(one, field.name) for one in several])
                for field in fields(cls)
            }
        )

    @classmethod
    def _of(cls, job: Job, layouts: Sequence[Layout]) -> DataParallelChoices:
        seconds = [_seconds(job, layout) for layout in layouts]
        replicate = np.array([layout.replicate for layout in layouts])
        return cls(
            replicate=replicate,
            shards=layouts[0].split.data // replicate,
            reshard_after_forward=np.array([layout.reshard_after_forward for layout in layouts]),
            recorded=np.array([job.records(layout) for layout in layouts]),
            **{
                name: np.array([of_one[name] for of_one in seconds], np.float64)
                for name in seconds[0]
            },
        )


def _seconds(job: Job, layout: Layout) -> dict[str, float]:
    """Seconds under one layout, by the names of the attributes of `DataParallelChoices`."""
    split, machine = layout.split, job.machine
    shards = split.data // layout.replicate
    group = Group(shards, split.tensor)
    copies = Group(layout.replicate, split.tensor * shards)
    parts = rank_parts(job, split)

    def gathering(parameters: float) -> float:
        return group.gathering(machine, job.element_bytes * parameters)

    def reduction(parameters: float) -> float:
        scatter = group.gathering(machine, job.reduce_bytes * parameters)
        return scatter + copies.sum(machine, job.reduce_bytes * parameters / shards)

    block = max(part.block for part in parts)
    root = max(part.root for part in parts)
    return {
        "gather": gathering(block),
        "reduce": reduction(block),
        "root_gather": sum(gathering(part.root) for part in parts if part.root),
        "root_reduce": reduction(root) + _shared_gradients(job, layout, parts),
        "update": _update(job, layout, parts),
    }


def _shared_gradients(job: Job, layout: Layout, parts: Sequence[RankParameters]) -> float:
    """Seconds to sum gradients of which several ranks hold parts: keys/values, norms, the table."""
    split, model = layout.split, job.config.model
    shards, hidden = split.data // layout.replicate, model.hidden_size
    seconds = 0.0
    replicated = model.kv_ranks(split.tensor) < split.tensor
    if split.tensor > 1 and (replicated or split.sequence):
        layers = max(part.layers for part in parts)
        vectors = 2 * model.kv_size if replicated else 4
        size = 4 * layers * hidden * vectors / shards
        seconds += Group(split.tensor, 1).sum(job.machine, size)
    if split.pipeline > 1:
        table = 4 * job.vocab_size / split.tensor * hidden / shards
        ends = Group(2, split.tensor * split.data * (split.pipeline - 1))
        seconds += ends.message(job.machine, table / 2)
    return seconds


def _update(job: Job, layout: Layout, parts: Sequence[RankParameters]) -> float:
    machine, part = job.machine, max(parts, key=lambda part: part.total)
    shards, of_muon = layout.split.data // layout.replicate, muon.is_used(job)
    # AdamW reads weight, gradient and moments, and the gradient again for its norm; it writes 3.
    moved = 32.0 * part.total / shards
    if of_muon:
        moved += (muon.MOVED_BYTES + 2 * job.element_bytes - 32.0) * part.matrices / shards
    # Copies into and out of messages; a single rank makes them too.
    moved += (2 * job.element_bytes + 2 * job.reduce_bytes) * part.total
    rate = 1e9 * machine.gpu.bandwidth * machine.rates.elementwise
    norm = Group(job.ranks, 1).sum(machine, 8)
    seconds = moved / rate + norm + machine.rates.step
    if of_muon:
        most = max(parts, key=lambda part: part.layers)
        seconds += muon.update_seconds(job, layout.split, layout.replicate, most)
    return seconds
