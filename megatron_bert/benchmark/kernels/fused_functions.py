"""The fused kernels one by one, as autograd functions; a block calls the kernels directly.

Shape suffixes: T tokens, D hidden, F feed-forward, P = 2 F: gate's features and then up's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_bert.model.fused_activation import (
    Activation,
    gated_activation,
    gated_activation_gradients,
)
from megatron_bert.model.fused_norm import (
    BranchMask,
    add_branch,
    branch_gradients,
    norm_gradients,
)


def added(x_TD: Tensor, y_TD: Tensor, bias_D: Tensor | None, mask: BranchMask) -> Tensor:
    """The sum x + dropout(y + bias), [T, D]."""
    sum_TD: Tensor = _Added.apply(x_TD, y_TD, bias_D, mask)  # type: ignore[no-untyped-call]
    return sum_TD


def residual_norm(
    x_TD: Tensor,
    y_TD: Tensor | None,
    y_bias_D: Tensor | None,
    mask: BranchMask | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum x + dropout(y + bias) and its norm, [T, D] each; without a mask, x and its norm."""
    return _ResidualNorm.apply(  # type: ignore[no-any-return,no-untyped-call]
        x_TD, y_TD, y_bias_D, weight_D, bias_D, mask, eps
    )


def gated_down(
    gate_up_TP: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    weight_DF: Tensor,
    activation: Activation,
) -> Tensor:
    """The gated activation's product with the down projection's weight, [T, D]."""
    y_TD: Tensor = _GatedDown.apply(  # type: ignore[no-untyped-call]
        gate_up_TP, gate_bias_F, up_bias_F, weight_DF, activation
    )
    return y_TD


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, y_bias: Tensor | None, mask: BranchMask) -> Tensor:
        ctx.mask, ctx.dtype = mask, x.dtype
        return add_branch(x, mask, y, y_bias, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *branch_gradients(grads[0], ctx.mask, ctx.dtype), None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        y_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        mask: BranchMask | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        total, normed, mean, rstd = add_branch(x, mask, y, y_bias, (weight, bias, eps))
        ctx.save_for_backward(total, mean, rstd, weight, bias)
        ctx.mask = mask
        return x.view_as(x) if mask is None else total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, rstd, weight, bias = ctx.saved_tensors
        x_grad, y_grad, others = norm_gradients(
            grads[1], grads[0], total, mean, rstd, weight, ctx.mask,
            has_bias=bias is not None, dtype=weight.dtype,
        )  # fmt: skip
        y_bias_grad = others.pop() if ctx.mask is not None and ctx.mask.has_bias else None
        bias_grad = None if bias is None else others.pop()
        y_grads = (None, None) if ctx.mask is None else (y_grad, y_bias_grad)
        return x_grad, *y_grads, *others, bias_grad, None, None


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        weight: Tensor,
        activation: Activation,
    ) -> Tensor:
        ctx.save_for_backward(gate_up, gate_bias, up_bias, weight)
        ctx.activation = activation
        biases = None if gate_bias is None or up_bias is None else (gate_bias, up_bias)
        return F.linear(gated_activation(gate_up, biases, activation), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, gate_bias, up_bias, weight = ctx.saved_tensors
        biases = None if gate_bias is None else (gate_bias, up_bias)
        active = grads[0] @ weight
        gate_up_grad, bias_grads = gated_activation_gradients(
            active, gate_up, biases, ctx.activation, gate_up.dtype
        )
        both = (None, None) if bias_grads is None else bias_grads
        return gate_up_grad, *both, grads[0].T @ active, None
