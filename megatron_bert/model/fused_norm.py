"""The residual stream and its norms, by kernels of our own for CUDA.

They have two advantages over compiled blocks: gradients of biases and of norms are summed where the
values to be summed are written, without reading them again; and norms' outputs are not kept for the
gradients of the products' weights, but computed again for them.

Every sum is in fp32 and in an order that depends on shapes alone: the same input gives the same
bits.

Shape suffixes: T tokens that a rank holds, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.model import fused_norm_kernels, fused_tiles
from megatron_bert.model.fp8 import E4M3, SMALLEST_SCALE, largest_of
from megatron_bert.parallel.column_sums import column_sums
from megatron_bert.parallel.random import keep_threshold


@dataclass(frozen=True)
class BranchMask:
    """The dropout of a sub-layer's output where it is added to the residual stream.

    Attributes:
        dropout: probability of dropping an element.
        token_draws_T: [T], as `hash_dropout` takes them.
        channel_draws_D: [D], the same.
        has_bias: whether a bias is added to the output before dropout.
    """

    dropout: float
    token_draws_T: Tensor
    channel_draws_D: Tensor
    has_bias: bool

    @property
    def draws(self) -> tuple[Tensor, ...]:
        """Both draws, where there is dropout."""
        if self.dropout == 0.0:
            return ()
        return self.token_draws_T.contiguous(), self.channel_draws_D


def dropping(branch: BranchMask | None) -> tuple[int, float]:
    """The threshold and the scale of dropout that a kernel takes."""
    dropout = 0.0 if branch is None else branch.dropout
    return keep_threshold(dropout), 1.0 / (1.0 - dropout)


def add_branch(
    x: Tensor,
    branch: BranchMask | None,
    y: Tensor | None,
    y_bias: Tensor | None,
    norm: tuple[Tensor, Tensor | None, float] | None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a branch to the residual stream, x + dropout(y + bias), and normalise the sum.

    Args:
        x: [T, D].
        branch: the dropout of the branch's elements; None: nothing is added.
        y: [T, D], the branch's output; None without one.
        y_bias: [D]; None where there is none.
        norm: weight [D], bias [D] or None, and epsilon of the norm that follows; None where none
            follows.
        scale: fp32 [1]; if given, the norm's output is in E4M3, and the scale of its numbers is
            written here, which depends on the norm's weight and bias alone.

    Returns:
        The sum and its norm [T, D]; mean and reciprocal deviation, fp32 [T]. In place of any that
        does not exist, x.
    """
    T, D = x.shape
    x, draws = x.contiguous(), () if branch is None else branch.draws
    sum_TD = normed = mean = rstd = weight = x
    bias, eps = None, 0.0
    if branch is not None:
        sum_TD = torch.empty_like(x)
    if norm is not None:
        weight, bias, eps = norm
        normed = torch.empty_like(x, dtype=x.dtype if scale is None else E4M3)
        mean, rstd = (x.new_empty(T, dtype=torch.float32) for _ in range(2))
    # Where an array does not exist, the kernel does not read what it is given in its place.
    token_draws, channel_draws = draws or (x, x)
    tile = fused_tiles.ROW_TILING.rows(D)
    fused_norm_kernels.fused_residual_norm_kernel[(ceil_div(T, tile.tokens),)](
        x, x if y is None else y.contiguous(), x if y_bias is None else y_bias, token_draws,
        channel_draws, weight, x if bias is None else bias, sum_TD, normed, mean, rstd,
        x if scale is None else scale, T, D, eps, *dropping(branch), largest_of(E4M3),
        SMALLEST_SCALE,
        HAS_BRANCH=branch is not None, HAS_BRANCH_BIAS=y_bias is not None, DROPOUT=bool(draws),
        NORM=norm is not None, HAS_BIAS=bias is not None, SCALED=scale is not None,
        **tile.options(),
    )  # fmt: skip
    return sum_TD, normed, mean, rstd


def norm_again(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute a norm's output again, [T, D], from its input and the results of `add_branch`."""
    T, D = x.shape
    normed, tile = torch.empty_like(x), fused_tiles.ROW_TILING.rows(D)
    fused_norm_kernels.fused_norm_again_kernel[(ceil_div(T, tile.tokens),)](
        x, mean, rstd, weight, x if bias is None else bias, normed, T, D,
        HAS_BIAS=bias is not None, **tile.options(),
    )  # fmt: skip
    return normed


def norm_gradients(
    normed_grad: Tensor,
    sum_grad: Tensor,
    sum_TD: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    branch: BranchMask | None,
    *,
    has_bias: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute gradients from those of a sum and of its norm.

    Args:
        normed_grad: [T, D].
        sum_grad: [T, D], what comes back through the residual stream.
        sum_TD: [T, D].
        mean: fp32 [T], as `add_branch` gave it.
        rstd: fp32 [T], the same.
        weight: [D], the norm's.
        branch: what was added; None: nothing.
        has_bias: whether the norm has one.
        dtype: dtype of the parameters' gradients.

    Returns:
        The gradients of x and of the branch's output, [T, D], without dropout the same tensor; and
        a list of those of the norm's weight, its bias and the branch's bias, [D], that exist.
    """
    T, D = sum_TD.shape
    draws, has_branch_bias = (branch.draws, branch.has_bias) if branch else ((), False)
    x_grad = torch.empty_like(sum_TD)
    y_grad = torch.empty_like(sum_TD) if draws else x_grad
    tile = fused_tiles.ROW_TILING.gradient_rows(D)
    programs = tile.programs(T, fused_tiles.ROW_TILING.row_programs)
    sums = mean.new_empty((programs, 1 + has_bias + has_branch_bias, D))
    fused_norm_kernels.fused_residual_norm_gradient_kernel[(programs,)](
        normed_grad.contiguous(), sum_grad.contiguous(), sum_TD, mean, rstd, weight,
        *(draws or (mean, mean)), x_grad, y_grad, sums, T, D, *dropping(branch),
        HAS_BIAS=has_bias, HAS_BRANCH_BIAS=has_branch_bias, DROPOUT=bool(draws),
        **tile.options(loops=True),
    )  # fmt: skip
    return x_grad, y_grad, list(column_sums(sums.flatten(1), dtype).view(-1, D))


def branch_gradients(
    sum_grad: Tensor, branch: BranchMask, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the branch's output, [T, D], and its bias, [D], where no norm follows."""
    sum_grad = sum_grad.contiguous()
    draws, has_bias = branch.draws, branch.has_bias
    if not (draws or has_bias):
        return sum_grad, None
    T, D = sum_grad.shape
    y_grad = torch.empty_like(sum_grad) if draws else sum_grad
    tile = fused_tiles.ROW_TILING.rows(D)
    programs = tile.programs(T, fused_tiles.ROW_TILING.row_programs)
    sums = sum_grad.new_empty((programs if has_bias else 0, D), dtype=torch.float32)
    fused_norm_kernels.fused_branch_gradient_kernel[(programs,)](
        sum_grad, *(draws or (sums, sums)), y_grad, sums, T, D, *dropping(branch),
        HAS_BRANCH_BIAS=has_bias, DROPOUT=bool(draws), **tile.options(loops=True),
    )  # fmt: skip
    return y_grad, column_sums(sums, dtype) if has_bias else None
