"""The residual stream and its norms, by kernels of our own for CUDA.

Two things hold that compiled blocks do not have: gradients of biases and of norms are summed where
what they are sums of is written, not read again; and norms' outputs are not kept for the gradients
of the products' weights, for which they are made again.

Every sum is in fp32 and in an order that follows from shapes alone: the same input gives the same
bits.

Shape suffixes: T tokens that a rank holds, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from megatron_bert.model import fused_kernels, fused_tiles
from megatron_bert.parallel.column_sums import column_sums
from megatron_bert.parallel.deferred import gradient_dtype
from megatron_bert.parallel.random import keep_threshold


@dataclass(frozen=True)
class Branch:
    """What a sub-layer adds to the residual stream.

    Attributes:
        y_TD: [T, D], what its last product gave.
        bias_D: [D], that product's; None where it has none.
        dropout: probability of dropping an element of their sum.
        token_draws_T: [T], as `hash_dropout` takes them.
        channel_draws_D: [D], the same.
    """

    y_TD: Tensor
    bias_D: Tensor | None
    dropout: float
    token_draws_T: Tensor
    channel_draws_D: Tensor


@dataclass(frozen=True)
class Normed:
    """A LayerNorm's output, which can be made again.

    Attributes:
        output_TD: [T, D].
        again: makes it again, without a gradient.
    """

    output_TD: Tensor
    again: Callable[[], Tensor]


def residual_norm(
    x_TD: Tensor,
    branch: Branch | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Normed]:
    """Add a branch to the residual stream, and normalise the sum.

    Args:
        x_TD: [T, D].
        branch: what is added; None: nothing. (Then x is returned too, so that both its gradients
            come back to one place.)
        weight_D: [D], the norm's.
        bias_D: [D], the norm's; None where it has none.
        eps: the norm's.

    Returns:
        x + dropout(y + bias), and its norm.
    """
    sum_TD, mean_T, rstd_T, normed_TD = _ResidualNorm.apply(  # type: ignore[no-untyped-call]
        x_TD,
        branch and branch.y_TD,
        branch and branch.bias_D,
        weight_D,
        bias_D,
        branch,
        eps,
    )
    kept = (sum_TD.detach(), mean_T, rstd_T, weight_D.detach(), bias_D)
    return sum_TD, Normed(normed_TD, lambda: _norm_again(*kept))


def add_branch(x_TD: Tensor, branch: Branch) -> Tensor:
    """Add a branch to the residual stream: x + dropout(y + bias)."""
    sum_TD: Tensor = _AddBranch.apply(x_TD, branch.y_TD, branch.bias_D, branch)  # type: ignore[no-untyped-call]
    return sum_TD


def _dropping(branch: Branch | None) -> tuple[int, float]:
    """A kernel's threshold and scale."""
    dropout = 0.0 if branch is None else branch.dropout
    return keep_threshold(dropout), 1.0 / (1.0 - dropout)


def _draws(branch: Branch | None) -> tuple[Tensor, ...]:
    """What a branch's mask is made of, where it has one."""
    if branch is None or branch.dropout == 0.0:
        return ()
    return branch.token_draws_T.contiguous(), branch.channel_draws_D


def _add_and_normalize(
    x: Tensor,
    branch: Branch | None,
    norm: tuple[Tensor, Tensor | None, float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its norm, mean and reciprocal deviation; those that there are none of are x."""
    T, D = x.shape
    x, draws = x.contiguous(), _draws(branch)
    sum_TD = normed = mean = rstd = weight = x
    bias, eps = None, 0.0
    if branch is not None:
        sum_TD = torch.empty_like(x)
    if norm is not None:
        weight, bias, eps = norm
        normed = torch.empty_like(x)
        mean, rstd = (x.new_empty(T, dtype=torch.float32) for _ in range(2))
    # Where there is no array the kernel reads none, whatever it is given.
    y = x if branch is None else branch.y_TD.contiguous()
    branch_bias = None if branch is None else branch.bias_D
    token_draws, channel_draws = draws or (x, x)
    tile = fused_tiles.TILING.rows(D)
    fused_kernels.fused_residual_norm_kernel[(cdiv(T, tile.tokens),)](
        x, y, x if branch_bias is None else branch_bias, token_draws, channel_draws, weight,
        x if bias is None else bias, sum_TD, normed, mean, rstd, T, D, eps, *_dropping(branch),
        HAS_BRANCH=branch is not None, HAS_BRANCH_BIAS=branch_bias is not None,
        DROPOUT=bool(draws), NORM=norm is not None, HAS_BIAS=bias is not None, **tile.options(),
    )  # fmt: skip
    return sum_TD, normed, mean, rstd


def _norm_again(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    T, D = x.shape
    normed, tile = torch.empty_like(x), fused_tiles.TILING.rows(D)
    fused_kernels.fused_norm_again_kernel[(cdiv(T, tile.tokens),)](
        x, mean, rstd, weight, x if bias is None else bias, normed, T, D,
        HAS_BIAS=bias is not None, **tile.options(),
    )  # fmt: skip
    return normed


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        branch: Branch | None,
        eps: float,
    ) -> tuple[Tensor, ...]:
        sum_TD, normed, mean, rstd = _add_and_normalize(x, branch, (weight, bias, eps))
        ctx.has_biases = (bias is not None, branch_bias is not None)
        ctx.dropping, ctx.has_branch, ctx.parameter = _dropping(branch), branch is not None, weight
        # All that is kept goes this way, so that recomputation holds nothing of it.
        ctx.save_for_backward(sum_TD, mean, rstd, weight, *_draws(branch))
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        if branch is None:
            sum_TD = x.view_as(x)
        return sum_TD, mean, rstd, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_grad, _, _, normed_grad = grads
        assert sum_grad is not None
        assert normed_grad is not None
        sum_TD, mean, rstd, weight, *draws = ctx.saved_tensors
        has_bias, has_branch_bias = ctx.has_biases
        T, D = sum_TD.shape
        x_grad = torch.empty_like(sum_TD)
        y_grad = torch.empty_like(sum_TD) if draws else x_grad
        tile = fused_tiles.TILING.gradient_rows(D)
        programs = tile.programs(T, fused_tiles.TILING.row_programs)
        sums = mean.new_empty((programs, 1 + has_bias + has_branch_bias, D))
        fused_kernels.fused_residual_norm_gradient_kernel[(programs,)](
            normed_grad.contiguous(), sum_grad.contiguous(), sum_TD, mean, rstd, weight,
            *(draws or (mean, mean)), x_grad, y_grad, sums, T, D, *ctx.dropping,
            HAS_BIAS=has_bias, HAS_BRANCH_BIAS=has_branch_bias, DROPOUT=bool(draws),
            **tile.options(loops=True),
        )  # fmt: skip
        dtype = gradient_dtype(ctx.parameter)
        weight_grad, *bias_grads = column_sums(sums.flatten(1), dtype).view(-1, D)
        bias_grad = bias_grads.pop(0) if has_bias else None
        branch_bias_grad = bias_grads.pop(0) if has_branch_bias else None
        return (
            x_grad,
            y_grad if ctx.has_branch else None,
            branch_bias_grad,
            weight_grad,
            bias_grad,
            None,
            None,
        )


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, branch_bias: Tensor | None, branch: Branch
    ) -> Tensor:
        ctx.bias, ctx.dropping = branch_bias, _dropping(branch)
        ctx.save_for_backward(*_draws(branch))
        return _add_and_normalize(x, branch, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        draws, sum_grad = ctx.saved_tensors, grads[0].contiguous()
        has_bias = ctx.bias is not None
        if not (draws or has_bias):
            return sum_grad, sum_grad, None, None
        T, D = sum_grad.shape
        y_grad = torch.empty_like(sum_grad) if draws else sum_grad
        tile = fused_tiles.TILING.rows(D)
        programs = tile.programs(T, fused_tiles.TILING.row_programs)
        sums = sum_grad.new_empty((programs if has_bias else 0, D), dtype=torch.float32)
        fused_kernels.fused_branch_gradient_kernel[(programs,)](
            sum_grad, *(draws or (sums, sums)), y_grad, sums, T, D, *ctx.dropping,
            HAS_BRANCH_BIAS=has_bias, DROPOUT=bool(draws), **tile.options(loops=True),
        )  # fmt: skip
        bias_grad = column_sums(sums, gradient_dtype(ctx.bias)) if has_bias else None
        return sum_grad, y_grad, bias_grad, None
