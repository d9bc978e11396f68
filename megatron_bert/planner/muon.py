"""What Muon's update takes in addition to AdamW's: matrices are assembled and orthogonalised.

Ranks that hold shards or copies of the blocks' matrices divide the whole matrices among themselves
(`parallel.whole_matrices`); each is orthogonalised by some iterations (`optim.muon`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.config.block_matrices import block_matrices
from megatron_bert.config.muon import BATCH_ELEMENTS, ITERATIONS, iteration_flops
from megatron_bert.config.parameters import RankParameters
from megatron_bert.planner.arrays import Floats
from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import Split
from megatron_bert.planner.network import Group

# Bytes moved per element: momentum, weights and gradients pass through fp32 kernels of one
# operation each.
MOVED_BYTES = 104.0


@dataclass(frozen=True)
class _Matrix:
    """Matrices of one shape in a block.

    Attributes:
        shorter: length of the shorter side.
        longer: length of the longer side.
        count: number of them in a block.
    """

    shorter: int
    longer: int
    count: int

    @property
    def elements(self) -> float:
        """Elements of one matrix."""
        return float(self.shorter * self.longer)

    @property
    def flops(self) -> float:
        """FLOPs of orthogonalising one matrix."""
        return float(ITERATIONS * iteration_flops(self.shorter, self.longer))


def is_used(job: Job) -> bool:
    """Whether Muon updates the blocks' matrices."""
    return job.config.optimizer.name == "muon"


def update_seconds(job: Job, split: Split, replicate: int, part: RankParameters) -> float:
    """Seconds of a pipeline rank's iterations and messages, without its elementwise kernels.

    Args:
        job: the run.
        split: how ranks share the model.
        replicate: copies of the weights.
        part: what the pipeline rank holds.
    """
    return _iterations(job, split, part.layers) + _messages(job, split, replicate, part)


def _iterations(job: Job, split: Split, layers: int) -> float:
    """Seconds on the busiest rank; the costliest matrices go first, each to the least busy rank."""
    owners, machine = split.tensor * split.data, job.machine
    matrices = list(_matrices(job))
    mean = layers * sum(matrix.count * matrix.flops for matrix in matrices) / owners
    costliest = max(matrices, key=lambda matrix: matrix.flops)
    most = ceil_div(layers * costliest.count, owners) * costliest.flops
    peak = machine.peak(job.config.precision.compute) * machine.rates.gemm
    return max(mean, most) / peak


def _messages(job: Job, split: Split, replicate: int, part: RankParameters) -> float:
    """Seconds to the owners and back, axis by axis; copies need no message on the way there."""
    shards, machine = split.data // replicate, job.machine
    of_rank = job.element_bytes * part.matrices / shards
    over_shards = Group(shards, split.tensor).exchange(machine, of_rank)
    to_copies = Group(replicate, split.tensor * shards).exchange(machine, of_rank)
    over_tensor = Group(split.tensor, 1).exchange(machine, of_rank / replicate)
    return 2 * over_shards + to_copies + 2 * over_tensor


def working_bytes(
    job: Job, held: Floats, alike: Floats, owners: Floats, replicate: Floats, shards: Floats
) -> Floats:
    """Bytes that the update holds in addition to weights, gradients and states.

    Args:
        job: the run.
        held: elements of a rank's matrices, including all its data-parallel ranks' shards.
        alike: elements of the matrices of one shape.
        owners: ranks that divide the matrices.
        replicate: copies of the weights.
        shards: ranks over which a copy is sharded.
    """
    e, largest = job.element_bytes, max(matrix.elements for matrix in _matrices(job))
    own = held / shards
    owned = np.maximum(own / replicate, largest)
    # A larger matrix is a batch of its own.
    batch = np.minimum(np.minimum(alike, max(BATCH_ELEMENTS, largest)), owned)
    moments: list[Floats] = [
        # The momentum's change, and directions in the compute dtype.
        (4.0 + e) * own,
        # The owned matrices and the other batches' results; for the current batch the stack, x
        # before and after, and two products x x^T, which have about 3/8 of its elements each.
        e * (2 * owned + 2.75 * batch),
        # Directions, the message made from them, and the received one; results on the way back.
        (owners > 1).astype(np.float64) * e * np.maximum(3 * own + owned, 3 * owned + own),
    ]
    return np.maximum(np.maximum(moments[0], moments[1]), moments[2])


def elements_alike(job: Job) -> float:
    """Elements of a block's matrices of one shape, orthogonalised together; 0 without Muon."""
    if not is_used(job):
        return 0.0
    return max(matrix.count * matrix.elements for matrix in _matrices(job))


def _matrices(job: Job) -> Iterator[_Matrix]:
    """A block's matrices, grouped by shape."""
    counts = Counter((matrix.outputs, matrix.inputs) for matrix in block_matrices(job.config.model))
    for (outputs, inputs), count in counts.items():
        yield _Matrix(min(outputs, inputs), max(outputs, inputs), count)
