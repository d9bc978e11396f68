"""A small training state in every sharding a run can have, for tests on any number of ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

Split = tuple[Placement, Placement]

# Over a mesh dp x tp. Row counts that no size divides leave uneven and empty shards.
SPLITS: dict[str, Split] = {
    "model.uneven.weight": (Shard(0), Replicate()),
    "model.both.weight": (Shard(0), Shard(0)),
    "model.grid.weight": (Shard(0), Shard(1)),
    "model.column.bias": (Replicate(), Shard(0)),
    "model.short.bias": (Shard(0), Replicate()),
    "model.replicated.weight": (Replicate(), Replicate()),
    "optim.grid.exp_avg": (Shard(0), Shard(1)),
}


def whole_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """The same tensors on every rank, of many types; the last three stay unsharded."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.uneven.weight": normal(7, 6),
        "model.both.weight": normal(8, 3),
        "model.grid.weight": normal(5, 8).bfloat16(),
        "model.column.bias": normal(12),
        "model.short.bias": normal(2),
        "model.replicated.weight": normal(3, 4),
        "optim.grid.exp_avg": normal(5, 8),
        "optim.step": torch.tensor(float(seed + 3)),
        "counts": torch.randint(-(2**62), 2**62, (9,), generator=generator),
        "transposed": normal(4, 3).T,
    }


def sharded(tensors: dict[str, torch.Tensor], tensor_parallel: int) -> dict[str, torch.Tensor]:
    """Shard `tensors` over all ranks, as (world / tp) x tp."""
    world = dist.get_world_size()
    mesh = init_device_mesh(
        "cpu", (world // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp")
    )
    return {
        name: distribute_tensor(tensor, mesh, SPLITS[name]) if name in SPLITS else tensor
        for name, tensor in tensors.items()
    }


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert whole.dtype == expected[name].dtype, name
        assert torch.equal(whole, expected[name]), name


def state_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(math.prod(tensor.shape) * tensor.itemsize for tensor in tensors.values())
