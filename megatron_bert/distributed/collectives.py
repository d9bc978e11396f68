"""Collectives of the layers: begun and waited for, or with a gradient.

Sums are the g of Megatron-LM (Shoeybi et al. 2019, section 3) and its counterpart of sequence
parallelism (Korthikanti et al. 2022, section 4.2.2). Tensors are gathered and scattered along
dimension 0, where neither needs a copy. All trace under `torch.compile` without a graph break,
being built on functional collectives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What PyTorch's functional collectives call, under names that do not change from one release to
# the next.
_operators = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    """Reduce over the group without a gradient; returns a new tensor."""
    return wait(_operators.all_reduce(x, op, group.group_name))


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to sum over the group; the result may be read after `wait`."""
    return _tensor(_operators.all_reduce(x, "sum", group.group_name))


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to lay the ranks' tensors end to end; the result may be read after `wait`."""
    return _tensor(_operators.all_gather_into_tensor(x, group.size(), group.group_name))


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to sum over the group, each rank its stretch; may be read after `wait`."""
    return _tensor(_operators.reduce_scatter_tensor(x, "sum", group.size(), group.group_name))


def wait(pending: Tensor) -> Tensor:
    """Return what a started collective gives; what follows is ordered behind it."""
    return _tensor(_operators.wait_tensor(pending))


def _tensor(result: Any) -> Tensor:
    assert isinstance(result, Tensor)
    return result


class _ReduceFromGroup(torch.autograd.Function):
    """g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ReduceScatterFromGroup(torch.autograd.Function):
    """The conjugate of an all-gather: reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_reduce_scatter(x.contiguous(), group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_gather(grads[0].contiguous(), ctx.group)), None


def reduce_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results; the sum's gradient goes to each of them unchanged."""
    return x if group.size() == 1 else _ReduceFromGroup.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_scatter_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results, of which each keeps its stretch of dimension 0.

    Args:
        x: [N, ...], N divisible by the number of ranks.
        group: the ranks.

    Returns:
        [N / ranks, ...].
    """
    return x if group.size() == 1 else _ReduceScatterFromGroup.apply(x, group)  # type: ignore[no-untyped-call]
