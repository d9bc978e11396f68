"""Collectives for the layers: started and waited for, or with a gradient.

Sums are the g of Megatron-LM (Shoeybi et al. 2019, section 3) and its counterpart of sequence
parallelism (Korthikanti et al. 2022, section 4.2.2). Tensors are gathered and scattered along
dimension 0, where neither needs a copy.

Compiled code uses functional collectives, which trace without a graph break. Other code uses the
group's own: under gloo, PyTorch's functional ones corrupt memory (2.13; of runs of a minute and
more in which two ranks did nothing but gather small tensors, on busy cores, 10 of 25 ended by a
signal, and none of 15 with the group's own).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# The operators that PyTorch's functional collectives call; their names do not change from release
# to release.
_operators = torch.ops._c10d_functional

# PyTorch 2.13 has renamed these.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Pending(NamedTuple):
    """A collective that was started.

    Attributes:
        result: what it writes; may be read after `wait`.
        work: PyTorch's handle; None for a functional collective.
        sent: what it reads, kept alive until then.
    """

    result: Tensor
    work: dist.Work | None
    sent: Tensor


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    """Reduce over the group without a gradient; returns a new tensor."""
    return wait(_start_all_reduce(x, group, op))


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start summing over the group, into a new tensor."""
    return _start_all_reduce(x, group, "sum")


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start concatenating the ranks' tensors along dimension 0."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        pending = _operators.all_gather_into_tensor(x, group.size(), group.group_name)
        return Pending(pending, None, x)
    result = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return Pending(result, _all_gather(result, x, group=group, async_op=True), x)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start summing over the group; each rank gets its stretch of dimension 0."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        pending = _operators.reduce_scatter_tensor(x, "sum", group.size(), group.group_name)
        return Pending(pending, None, x)
    result = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return Pending(result, _reduce_scatter(result, x, group=group, async_op=True), x)


def wait(pending: Pending) -> Tensor:
    """Return the result of a started collective; later work is ordered after it."""
    if pending.work is None:
        return _tensor(_operators.wait_tensor(pending.result))
    pending.work.wait()
    return pending.result


def _start_all_reduce(x: Tensor, group: dist.ProcessGroup, op: str) -> Pending:
    if torch.compiler.is_compiling():
        return Pending(_operators.all_reduce(x, op, group.group_name), None, x)
    result = x.clone(memory_format=torch.contiguous_format)
    return Pending(result, dist.all_reduce(result, _OPS[op], group, async_op=True), x)


def _tensor(result: Any) -> Tensor:
    assert isinstance(result, Tensor)
    return result


class _ReduceFromGroup(torch.autograd.Function):
    """g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ReduceScatterFromGroup(torch.autograd.Function):
    """The conjugate of an all-gather: reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_reduce_scatter(x, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_gather(grads[0], ctx.group)), None


def reduce_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results; the sum's gradient goes to each of them unchanged."""
    return x if group.size() == 1 else _ReduceFromGroup.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_scatter_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results; each rank keeps its stretch of dimension 0.

    Args:
        x: [N, ...], N divisible by the number of ranks.
        group: the ranks.

    Returns:
        [N / ranks, ...].
    """
    return x if group.size() == 1 else _ReduceScatterFromGroup.apply(x, group)  # type: ignore[no-untyped-call]
