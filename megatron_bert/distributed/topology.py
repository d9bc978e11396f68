"""The arrangement of ranks: one device mesh, passed as a value."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

MESH_AXES = ("pp", "dp", "tp")


@dataclass(frozen=True)
class Topology:
    """Ranks as a mesh of pipeline x data x tensor parallelism.

    Neighbouring ranks share a tensor-parallel group, whose messages are the most frequent, so
    that a group stays inside a node.

    Attributes:
        mesh: three-dimensional mesh with the axes `pp`, `dp`, `tp`.
        device: this rank's device.
    """

    mesh: DeviceMesh
    device: torch.device

    @classmethod
    def build(
        cls,
        device: torch.device,
        *,
        pipeline: int = 1,
        data: int | None = None,
        tensor: int = 1,
        timeout_seconds: float | None = None,
    ) -> Topology:
        """Arrange all ranks; data parallelism takes what the other two leave.

        The layout was checked against the world size before (`config.checks`).

        Args:
            device: this rank's device.
            pipeline: ranks along `pp`.
            data: ranks along `dp`.
            tensor: ranks along `tp`.
            timeout_seconds: longest wait for a collective along an axis; None leaves PyTorch's.
        """
        if data is None:
            data = dist.get_world_size() // (pipeline * tensor)
        mesh = init_device_mesh(device.type, (pipeline, data, tensor), mesh_dim_names=MESH_AXES)
        if timeout_seconds is not None:
            # The mesh's groups do not take over the timeout of the group of all ranks.
            for axis in MESH_AXES:
                _set_pg_timeout(timedelta(seconds=timeout_seconds), mesh.get_group(axis))
        return cls(mesh, device)

    @property
    def data_parallel_size(self) -> int:
        """Number of ranks that see different rows."""
        return self.mesh["dp"].size()

    @property
    def data_parallel_rank(self) -> int:
        """Which share of the batch's rows this rank sees."""
        return self.mesh["dp"].get_local_rank()

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same slice of the model and see different rows."""
        return self.mesh.get_group("dp")

    @property
    def tensor_parallel(self) -> TensorParallelGroup:
        """The ranks that share each layer's weights."""
        return TensorParallelGroup(self.mesh["tp"])


@dataclass(frozen=True)
class TensorParallelGroup:
    """The tensor-parallel axis as layers see it.

    Attributes:
        mesh: the one-dimensional `tp` mesh.
    """

    mesh: DeviceMesh

    @property
    def size(self) -> int:
        """Number of ranks that share a layer."""
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """Which slice of a layer this rank holds."""
        return self.mesh.get_local_rank()

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of the axis."""
        return self.mesh.get_group()
