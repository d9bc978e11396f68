"""Whole matrices from shards: each rank gets some of the matrices, then every rank its parts back.

The work on whole matrices is thus divided among all ranks that hold parts of them or copies of
those parts, and each matrix is worked on once. A rank sends what it holds and receives as much;
gathering every matrix on every rank would send that many times over.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.config.muon import iteration_flops
from megatron_bert.distributed.topology import Topology
from megatron_bert.parallel.sharding import is_split_over

# A parameter is split over tensor parallelism first and each part over data parallelism, so the
# parts are joined in this order. Copies hold the same part.
_AXES = ("dp_shard", "dp_replicate", "tp")

Shape = tuple[int, ...]


class MatrixOwners:
    """Decides which rank works on which whole matrix, and moves matrices there and back.

    Every rank that holds parts of the matrices takes part in each call.

    Attributes:
        dtype: dtype of matrices and messages.
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], topology: Topology, dtype: torch.dtype
    ) -> None:
        """Assign the matrices to ranks.

        Args:
            matrices: this rank's parameters by name, the same names in the same order on all
                ranks that hold parts of them; DTensors where they are split.
            topology: the ranks.
            dtype: see the class.
        """
        mesh = topology.mesh
        axes = [axis for axis in _AXES if mesh.get_group(axis).size() > 1]
        shapes = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
        owners = _deal(shapes, {axis: mesh.get_group(axis).size() for axis in axes})
        self.dtype = dtype
        self._hops: list[_Hop] = []
        held = list(matrices)
        for number, axis in enumerate(axes):
            hop = _Hop(
                group=mesh.get_group(axis),
                joined={n: _part_over(axes[number + 1 :], matrices[n], mesh) for n in held},
                split={name: _split_dim(axis, matrices[name]) for name in held},
                owned_by=[
                    [name for name in held if owners[name][axis] == rank]
                    for rank in range(mesh.get_group(axis).size())
                ],
                empty=torch.empty(0, dtype=dtype, device=topology.device),
            )
            self._hops.append(hop)
            held = list(hop.owned_by[hop.rank])

    def gather(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """This rank's parts of all matrices, in `dtype` -> the whole matrices that it owns."""
        for hop in self._hops:
            parts = hop.gather(parts)
        return parts

    def scatter(self, wholes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The whole matrices that this rank owns -> its parts of all: `gather`'s way back."""
        for hop in reversed(self._hops):
            wholes = hop.scatter(wholes)
        return wholes


@dataclass(frozen=True)
class _Hop:
    """The exchange along one mesh axis.

    Attributes:
        group: the ranks along the axis.
        joined: shapes of the matrices after this hop, in the order of messages.
        split: the dimension along which the axis splits a matrix; None where each of its ranks
            holds the same.
        owned_by: for each of the axis' ranks, the names of the matrices that go to it.
        empty: an empty tensor of the messages' dtype and device.
    """

    group: dist.ProcessGroup
    joined: Mapping[str, Shape]
    split: Mapping[str, int | None]
    owned_by: Sequence[Sequence[str]]
    empty: Tensor

    @property
    def rank(self) -> int:
        return self.group.rank()

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of all matrices -> those that this rank owns, joined along the axis."""
        owned_by = self.owned_by
        # What all ranks of the axis hold is already on its owner.
        sent = [[n for n in names if self.split[n] is not None] for names in owned_by]
        mine = sent[self.rank]
        shapes = [[self._part_shape(n, rank) for n in mine] for rank in range(self.group.size())]
        received = self._all_to_all([[parts[name] for name in names] for names in sent], shapes)
        joined = dict(parts)
        for name, *pieces in zip(mine, *received, strict=True):
            dim = self.split[name]
            assert dim is not None
            joined[name] = torch.cat(pieces, dim)
        return {name: joined[name] for name in owned_by[self.rank]}

    def scatter(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The matrices that this rank owns, joined along the axis -> its parts of all."""
        owned_by, size = self.owned_by, self.group.size()
        sent = [
            [self._part(name, wholes[name], rank) for name in owned_by[self.rank]]
            for rank in range(size)
        ]
        shapes = [[self._part_shape(name, self.rank) for name in names] for names in owned_by]
        received = self._all_to_all(sent, shapes)
        return {
            name: part
            for names, parts in zip(owned_by, received, strict=True)
            for name, part in zip(names, parts, strict=True)
        }

    def _part(self, name: str, whole: Tensor, rank: int) -> Tensor:
        dim = self.split[name]
        if dim is None:
            return whole
        begin, length = _stretch(whole.shape[dim], rank, self.group.size())
        return whole.narrow(dim, begin, length)

    def _part_shape(self, name: str, rank: int) -> Shape:
        shape, dim = list(self.joined[name]), self.split[name]
        if dim is not None:
            _, shape[dim] = _stretch(shape[dim], rank, self.group.size())
        return tuple(shape)

    def _all_to_all(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]]
    ) -> list[list[Tensor]]:
        """Send a list of tensors to each rank; return what each sent, given its shapes."""
        message = torch.cat([self.empty, *(t.reshape(-1) for to_rank in sent for t in to_rank)])
        lengths = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
        received = self.empty.new_empty(sum(map(sum, lengths)))
        dist.all_to_all_single(
            received,
            message,
            list(map(sum, lengths)),
            [sum(tensor.numel() for tensor in to_rank) for to_rank in sent],
            group=self.group,
        )
        pieces = iter(torch.split(received, [n for of_rank in lengths for n in of_rank]))
        return [[next(pieces).view(shape) for shape in of_rank] for of_rank in shapes]


def _deal(shapes: Mapping[str, Shape], sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Each matrix's owner, as a rank per axis: the costliest first, to the least loaded rank."""
    loads = [(0, rank) for rank in range(math.prod(sizes.values()))]
    owners: dict[str, dict[str, int]] = {}
    costs = {name: iteration_flops(*sorted(shape)) for name, shape in shapes.items()}
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[name], rank))
        owners[name] = {}
        for axis, size in sizes.items():
            rank, owners[name][axis] = divmod(rank, size)
    return owners


def _split_dim(axis: str, matrix: Tensor) -> int | None:
    """The dimension along which an axis splits a matrix; None where all its ranks hold the same."""
    if not is_split_over(axis, matrix):
        return None
    assert isinstance(matrix, DTensor)
    names = matrix.device_mesh.mesh_dim_names
    assert names is not None
    dim: int = matrix.placements[names.index(axis)].dim  # type: ignore[attr-defined]
    return dim


def _part_over(axes: Sequence[str], matrix: Tensor, mesh: DeviceMesh) -> Shape:
    """Shape of this rank's part of a matrix that only these axes split, the last axis first."""
    shape = list(matrix.shape)
    for axis in reversed(axes):
        dim = _split_dim(axis, matrix)
        if dim is not None:
            group = mesh.get_group(axis)
            _, shape[dim] = _stretch(shape[dim], group.rank(), group.size())
    return tuple(shape)


def _stretch(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and length of a rank's part of a dimension, split as by `torch.chunk` and DTensor."""
    longest = ceil_div(length, ranks)
    begin = min(rank * longest, length)
    return begin, min(longest, length - begin)
