"""Parameters that every tensor-parallel rank holds whole but uses for only a part of the work.

A rank's gradient comes from its part of the work; the sum over the ranks is the whole gradient.
Summing once a step, after the last micro-batch and on the shards that data parallelism leaves,
takes one small message; a collective at each use would take one per parameter and micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from megatron_bert.distributed.collectives import all_reduce
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.parallel.sharding import local_part

_MARK = "partial_gradients"


def mark_partial(module: nn.Module, *names: str) -> None:
    """Mark these of the module's own parameters: each rank computes a part of their gradient.

    The mark is on the module because sharding replaces the parameters.
    """
    setattr(module, _MARK, names)


def per_token(module: nn.Module, tp: TensorParallelGroup) -> nn.Module:
    """Declare that a module is applied to each token independently, and return the module.

    If the ranks share the tokens, each computes a part of the gradient of the module's parameters.
    """
    if tp.shards_tokens:
        mark_partial(module, *(name for name, _ in module.named_parameters(recurse=False)))
    return module


def partial_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters that were marked, in the same order on all ranks of a group."""
    for root in modules:
        for module in root.modules():
            for name in getattr(module, _MARK, ()):
                yield module.get_parameter(name)


@torch.no_grad()
def sum_partial_gradients(modules: Iterable[nn.Module], tp: TensorParallelGroup) -> None:
    """Sum the marked parameters' gradients over the tensor-parallel ranks, in one message."""
    if tp.size == 1:
        return
    gradients = [
        local_part(parameter.grad)
        for parameter in partial_parameters(modules)
        if parameter.grad is not None
    ]
    if not gradients:
        return
    summed = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), tp.group)
    parts = torch.split(summed, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
