"""Parameters that all tensor-parallel ranks hold whole, but use for a part of the work each.

Their gradient on a rank is that part's; the sum over the ranks is the whole. Summing once a step,
after the last micro-batch and on the shards that data parallelism leaves, is one small message,
where a collective at each use would be one for every parameter of every micro-batch.
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
    """Remember that these of the module's own parameters get a part of their gradient a rank.

    The module remembers, since sharding replaces parameters by others.
    """
    setattr(module, _MARK, names)


def per_token(module: nn.Module, tp: TensorParallelGroup) -> nn.Module:
    """Say that a module is applied to each token by itself; returns the module.

    Where the ranks share the tokens, each has a part of the gradient of its parameters.
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
