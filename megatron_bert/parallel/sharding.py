"""How a parameter is split over the tensor-parallel axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from megatron_bert.distributed.topology import TensorParallelGroup


def make_parameter(
    shape: tuple[int, ...], tp: TensorParallelGroup, shard_dim: int | None = None
) -> nn.Parameter:
    """Make an uninitialised parameter of this global shape, split along `shard_dim` over `tp`.

    A split parameter is a DTensor, so that checkpoints and the gradient norm know its place; a
    replicated one, and any on an axis of one rank, is an ordinary tensor.

    Raises:
        ValueError: the dimension does not divide evenly.
    """
    if shard_dim is None or tp.size == 1:
        return nn.Parameter(torch.empty(shape))
    if shape[shard_dim] % tp.size:
        raise ValueError(f"dimension {shard_dim} of {shape} does not divide over {tp.size} ranks")
    local_shape = list(shape)
    local_shape[shard_dim] //= tp.size
    local = torch.empty(local_shape)
    return nn.Parameter(DTensor.from_local(local, tp.mesh, [Shard(shard_dim)], run_check=False))


def local_part(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter, differentiably: what the layers compute on."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def is_split_over(axis: str, parameter: Tensor) -> bool:
    """Whether a parameter's parts differ along this axis of its mesh."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(
        name == axis and not placement.is_replicate()
        for name, placement in zip(names, parameter.placements, strict=True)
    )


def placed_like(local: Tensor, parameter: Tensor) -> Tensor:
    """Make `local` this rank's part of a tensor placed like `parameter`; shares storage."""
    if not isinstance(parameter, DTensor):
        return local
    # `from_local` takes ten times as long, and a step does this for each parameter.
    return DTensor(local, parameter._spec, requires_grad=False)  # type: ignore[no-untyped-call]
