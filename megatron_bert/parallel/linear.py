r"""Column- and row-parallel linear layers (Shoeybi et al. 2019, "Megatron-LM", section 3).

A weight is stored as in `nn.Linear`, [out, in]. Over two ranks

    column-parallel          [W_0]                 row-parallel
    y = x W^T,          W =  [---],                y = x W^T,   W = [W_0 | W_1],
    y = [y_0 | y_1]          [W_1]                 y = x_0 W_0^T + x_1 W_1^T

so that column-parallel, a pointwise function or attention, then row-parallel needs one
all-reduce forward (in the row-parallel layer) and one backward (in the column-parallel one).

Shape suffixes: B rows, S slots, D features in, F features out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.nn import functional as F

from megatron_bert.distributed.collectives import copy_to_group, reduce_from_group
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.parallel.sharding import local_part, make_parameter


class ColumnParallelLinear(nn.Module):
    """Weight and bias of y = x W^T + b whose output features are split over the ranks.

    With `replicated=True` every rank holds all of it (the key and value heads that do not divide
    over the ranks); its gradient is then summed over them, since each rank's heads use it.

    Layers that read the same input are computed together by `column_parallel`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TensorParallelGroup,
        *,
        replicated: bool = False,
    ) -> None:
        super().__init__()
        dim = None if replicated else 0
        self.weight = make_parameter((out_features, in_features), tp, dim)
        self.bias = make_parameter((out_features,), tp, dim)
        self.group = tp.group
        self.replicated = replicated

    def local_parameters(self) -> tuple[Tensor, Tensor]:
        """The weight and bias that this rank computes with."""
        weight, bias = local_part(self.weight), local_part(self.bias)
        if self.replicated:
            weight, bias = copy_to_group(weight, self.group), copy_to_group(bias, self.group)
        return weight, bias


class RowParallelLinear(nn.Module):
    """y = x W^T + b whose input features are split over the ranks; the bias is added once."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.weight = make_parameter((out_features, in_features), tp, 1)
        self.bias = make_parameter((out_features,), tp)
        self.group = tp.group

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / tp] -> [..., out], the same on every rank of the group."""
        weight = local_part(self.weight)
        if self.group.size() == 1:
            return F.linear(x, weight, self.bias)
        return reduce_from_group(F.linear(x, weight), self.group) + self.bias


def column_parallel(
    x: Tensor, layers: tuple[ColumnParallelLinear, ...], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Apply several column-parallel layers to one input.

    Backward, the all-reduce of the input's gradient runs under the weights' gradient GEMMs, which
    two separate collectives around one linear layer could not do.

    Args:
        x: [..., in], the same on every rank of the group.
        layers: layers of `in` input features.
        group: the tensor-parallel group.

    Returns:
        One tensor [..., out / tp] a layer.
    """
    if group.size() == 1:
        return tuple(F.linear(x, *layer.local_parameters()) for layer in layers)
    pairs = [layer.local_parameters() for layer in layers]
    weights, biases = zip(*pairs, strict=True)
    return _ColumnParallel.apply(x, group, *weights, *biases)  # type: ignore[no-any-return,no-untyped-call]


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights, biases = parameters[:count], parameters[count:]
        ctx.group = group
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_grad = sum(g @ w for g, w in zip(grads[1:], weights[1:], strict=True))
        x_grad = grads[0] @ weights[0] + x_grad
        pending = functional.all_reduce(x_grad, "sum", ctx.group)
        x_ND = x.flatten(0, -2)
        grads_NF = [grad.flatten(0, -2) for grad in grads]
        weight_grads = [grad_NF.T @ x_ND for grad_NF in grads_NF]
        bias_grads = [grad_NF.sum(0) for grad_NF in grads_NF]
        x_grad = functional.wait_tensor(pending)  # type: ignore[no-untyped-call]
        return x_grad, None, *weight_grads, *bias_grads
