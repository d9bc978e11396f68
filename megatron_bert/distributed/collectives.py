"""Collectives with a gradient, after the f and g of Megatron-LM (Shoeybi et al. 2019, section 3).

All of them are the identity for a group of one rank, and trace under `torch.compile` without a
graph break, being built on functional collectives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    """Reduce over the group without a gradient; returns a new tensor."""
    reduced: Tensor = functional.wait_tensor(functional.all_reduce(x, op, group))  # type: ignore[no-untyped-call]
    return reduced


class _CopyToGroup(torch.autograd.Function):
    """f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous(), ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    """g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy_to_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Hand the same `x` to every rank's share of the work; their gradients are summed."""
    return x if group.size() == 1 else _CopyToGroup.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results; the sum's gradient goes to each of them unchanged."""
    return x if group.size() == 1 else _ReduceFromGroup.apply(x, group)  # type: ignore[no-untyped-call]
