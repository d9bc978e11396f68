"""How parameters are sharded over the data-parallel ranks."""

from __future__ import annotations

import math

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

# `_StridedShard` splits a dimension that tensor parallelism has already split.
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from megatron_bert.distributed.topology import Topology
from megatron_bert.parallel.sharding import local_part


class DataRanks:
    """The ranks over which a model's parameters are sharded, and those that hold the same shards.

    Of a parameter's R rows, each of W ranks has ceil(R / W); the last ranks have fewer or none.

    Attributes:
        group: ranks over which parameters are sharded.
        size: number of them.
        copies: ranks that hold the same shards; None where there is one copy.
    """

    def __init__(self, topology: Topology) -> None:
        self.group = topology.mesh.get_group("dp_shard")
        self.size: int = self.group.size()
        copies = topology.mesh.get_group("dp_replicate")
        self.copies = copies if copies.size() > 1 else None
        self._axes = ("dp_shard",) if self.copies is None else ("dp_replicate", "dp_shard")
        self._mesh = topology.mesh
        # Slicing a mesh takes milliseconds when there are many ranks.
        self._meshes: dict[tuple[str, ...], DeviceMesh] = {}

    def rows_of_each(self, rows: int) -> int:
        """How many of a parameter's rows a rank has, counting those that the last ranks lack."""
        return math.ceil(rows / self.size)

    def shard_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """This rank's rows of a parameter, as a part of the whole one."""
        local = local_part(parameter).detach()
        each = self.rows_of_each(len(local))
        begin = min(self.group.rank() * each, len(local))
        shard = local[begin : begin + each].clone()
        axes, placements = self._axes, self._placements(Shard(0))
        if isinstance(parameter, DTensor):
            (split,) = parameter.placements
            if split.is_shard(0):
                # The rows are cut from a tensor-parallel rank's part, not from the whole.
                parts = parameter.device_mesh.size()
                placements = self._placements(_StridedShard(0, split_factor=parts))
            axes, placements = (*axes, "tp"), (*placements, split)
        placed = DTensor.from_local(
            shard,
            self._cut(axes),
            placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return nn.Parameter(placed)

    def _placements(self, shard: Placement) -> tuple[Placement, ...]:
        return (shard,) if self.copies is None else (Replicate(), shard)

    def _cut(self, axes: tuple[str, ...]) -> DeviceMesh:
        if axes not in self._meshes:
            self._meshes[axes] = self._mesh[axes]
        return self._meshes[axes]
