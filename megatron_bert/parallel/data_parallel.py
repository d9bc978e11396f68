"""Sharded data parallelism: PyTorch's `fully_shard` with this project's policy.

Weights and optimizer states are sharded in fp32 over the data-parallel ranks, computation is in
`compute_dtype`, gradients are reduced in fp32 (or bf16, on request) and summed, never averaged: the
loss is already divided by the number of masked tokens in the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron_bert.distributed.topology import Topology


def shard_over_data(
    model: nn.Module,
    units: Sequence[nn.Module],
    topology: Topology,
    compute_dtype: torch.dtype,
    *,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = False,
) -> None:
    """Shard each unit's parameters over the data-parallel ranks, then what remains of the model.

    Args:
        model: the model, or a pipeline stage's part of it, changed in place.
        units: its blocks, in the order of the forward pass; each is gathered and reduced by
            itself, so that its messages run beside its neighbours' computation.
        topology: the ranks.
        compute_dtype: type of weights and activations in forward and backward.
        reduce_dtype: type in which a step's gradients are added up, over micro-batches and over
            the ranks; where one rank has all rows, it stays fp32.
        reshard_after_forward: free a unit's gathered weights after its forward pass (ZeRO-3); by
            default they stay from the step's first forward to its last backward.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=sum_dtype(topology, reduce_dtype)
    )
    for module in (*units, model):
        fully_shard(
            module,
            mesh=topology.sharding_mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward and module is not model,
        )
    for unit, following in pairwise(units):
        # Asked for before the unit computes: the host need not run ahead of the device for it.
        assert isinstance(unit, FSDPModule)
        assert isinstance(following, FSDPModule)
        unit.set_modules_to_forward_prefetch([following])
    for sharded in _sharded_modules(model):
        if topology.data_parallel_size > 1:
            # A single rank's are not divided; told to divide by 1, PyTorch would make a pass.
            sharded.set_gradient_divide_factor(1.0)
        # Without it gloo is asked for a pre-multiplied sum, which it does not have.
        sharded.set_force_sum_reduction_for_comms(True)


def sum_dtype(topology: Topology, reduce_dtype: torch.dtype) -> torch.dtype:
    """In which type gradients are added up, as `shard_over_data` was given one."""
    # Where one rank has all rows there is nothing to send, and rounding would be for nothing.
    return torch.float32 if topology.data_parallel_size == 1 else reduce_dtype


def set_gradient_sync(model: nn.Module, enabled: bool, *, reshard: bool) -> None:
    """Say whether the coming backward pass reduces gradients, and frees the gathered weights.

    With gradient accumulation only the last micro-batch does: before it weights stay gathered and
    gradients stay local, so that a step gathers and reduces once however many micro-batches it
    has.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(enabled)
    model.set_reshard_after_backward(reshard)
    # Other micro-batches' forward passes may be waiting for their own.
    model.set_is_last_backward(enabled)


def add_up_gradients(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Say in which type a step's coming backward passes add up their gradients.

    A gradient in the compute type would be added to the sum in another by a kernel that converts
    number by number, at a quarter of a GPU's memory rate; and layers that know the type give their
    products in it, unrounded.

    Args:
        model: just after a forward pass, when its parameters are the gathered ones. Where they are
            not (ZeRO-3), or are parts of layers split over ranks, nothing is changed.
        dtype: of the sum; None: the parameters' own.
    """
    parameters = list(model.parameters())
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return
    for parameter in parameters:
        parameter.grad_dtype = dtype or parameter.dtype


def free_gathered_weights(model: nn.Module) -> None:
    """Go back to the shards after forward passes that no backward pass followed.

    Until then the model's parameters are the gathered copies in the compute type: whoever read
    them, to save them say, would get rounded weights.
    """
    for sharded in _sharded_modules(model):
        sharded.reshard()


def sharded_units(model: nn.Module) -> list[nn.Module]:
    """The units that `shard_over_data` was given."""
    return [
        module
        for module in model.modules()
        if isinstance(module, FSDPModule) and module is not model
    ]


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module
