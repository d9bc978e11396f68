"""The arrangement of ranks: one device mesh, passed as a value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_bert.config.schema import ParallelConfig
from megatron_bert.distributed.launch import set_timeout

MESH_AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Topology:
    """Ranks as a mesh of pipeline x data x tensor parallelism.

    Neighbouring ranks share a tensor-parallel group, whose messages are the most frequent, so
    that a group stays inside a node; the stages of a pipeline, which communicate least, lie
    farthest apart. Data parallelism has two axes: weights are sharded over `dp_shard` and copied
    over `dp_replicate` (HSDP).

    Attributes:
        mesh: four-dimensional mesh with the axes `MESH_AXES`.
        device: this rank's device.
        sequence_parallel: whether the ranks of a tensor-parallel group share the tokens where
            they do not share weights.
    """

    mesh: DeviceMesh
    device: torch.device
    sequence_parallel: bool = False

    @classmethod
    def of(
        cls, parallel: ParallelConfig, device: torch.device, timeout_seconds: float | None = None
    ) -> Topology:
        """Arrange all ranks as a configuration says; see `build`."""
        return cls.build(
            device,
            pipeline=parallel.pipeline,
            tensor=parallel.tensor,
            replicate=parallel.replicate,
            sequence_parallel=parallel.sequence,
            timeout_seconds=timeout_seconds,
        )

    @classmethod
    def build(
        cls,
        device: torch.device,
        *,
        pipeline: int = 1,
        tensor: int = 1,
        replicate: int = 1,
        sequence_parallel: bool = False,
        timeout_seconds: float | None = None,
    ) -> Topology:
        """Arrange all ranks; data parallelism takes what the other two leave.

        The layout was checked against the world size before (`config.checks`).

        Args:
            device: this rank's device.
            pipeline: ranks along `pp`.
            tensor: ranks along `tp`.
            replicate: ranks along `dp_replicate`.
            sequence_parallel: see the class.
            timeout_seconds: longest wait for a collective along an axis (NCCL's: a margin longer,
                see `launch.set_timeout`); None leaves PyTorch's.
        """
        shard = dist.get_world_size() // (pipeline * replicate * tensor)
        sizes = (pipeline, replicate, shard, tensor)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=MESH_AXES)
        if timeout_seconds is not None:
            # The mesh's groups do not take over the timeout of the group of all ranks.
            for axis in MESH_AXES:
                set_timeout(mesh.get_group(axis), device, timeout_seconds)
        if device.type == "cuda":
            # NCCL sets up a group at its first message, in which all of its ranks must take part,
            # but a pipeline's messages are between two. The first step would also be a bad time.
            for axis in MESH_AXES:
                dist.all_reduce(torch.zeros(1, device=device), group=mesh.get_group(axis))
        return cls(mesh, device, sequence_parallel)

    @property
    def data_parallel_size(self) -> int:
        """Number of ranks that see different rows."""
        return self._size("dp_replicate") * self._size("dp_shard")

    @property
    def data_parallel_rank(self) -> int:
        """Which share of the batch's rows this rank sees."""
        return self.replica * self._size("dp_shard") + self.mesh.get_local_rank("dp_shard")

    @property
    def replica(self) -> int:
        """Which copy of the sharded weights this rank belongs to."""
        return self.mesh.get_local_rank("dp_replicate")

    @property
    def pipeline_size(self) -> int:
        """Number of ranks that share the model's blocks."""
        return self._size("pp")

    @property
    def pipeline_rank(self) -> int:
        """Which of the pipeline's ranks this one is."""
        return self.mesh.get_local_rank("pp")

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """Ranks that compute the same rows, one stage after another."""
        return self.mesh.get_group("pp")

    @cached_property
    def tensor_parallel(self) -> TensorParallelGroup:
        """The ranks that share each layer's weights."""
        return TensorParallelGroup(self.mesh["tp"], self.sequence_parallel)

    @property
    def speaks_for_its_rows(self) -> bool:
        """Whether, of all ranks with the same rows, this is the one that counts these rows.

        In a sum over all ranks each row and each loss must count once. All ranks of a pipeline
        and of a tensor-parallel group have the same rows; the first of them speaks for these rows.
        Only the pipeline's last ranks hold the head, whose losses and scores are the same on all
        ranks of a tensor-parallel group; the first of that group speaks for these
        (`speaks_for_its_loss`).
        """
        return self.pipeline_rank == 0 and self.tensor_parallel.rank == 0

    @property
    def speaks_for_its_loss(self) -> bool:
        """The same for losses and scores; see `speaks_for_its_rows`."""
        return self.pipeline_rank == self.pipeline_size - 1 and self.tensor_parallel.rank == 0

    def _size(self, axis: str) -> int:
        # Not from `self.mesh[axis]`: slicing a mesh takes milliseconds when there are many ranks.
        return self.mesh.size(MESH_AXES.index(axis))


@dataclass(frozen=True)
class TensorParallelGroup:
    """The tensor-parallel axis as layers see it.

    Attributes:
        mesh: the one-dimensional `tp` mesh.
        shards_tokens: whether norms, dropout and the residual stream hold 1 / size of a
            micro-batch's tokens on each rank (sequence parallelism), not all of them.
    """

    mesh: DeviceMesh
    shards_tokens: bool = False

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
