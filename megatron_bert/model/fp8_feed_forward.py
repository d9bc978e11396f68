"""The feed-forward half of a fused block, its products in FP8.

The kernels that make a product's operands write them in FP8, so that little is read again only to
cast it or to find its largest number. For most arrays a bound on that number is known beforehand,
which is enough: FP8 numbers are floating-point, and a scale that is some powers of two too large
costs no precision but range, of which gradients in E5M2 have 30 powers of two and operands of the
forward pass, in E4M3, have 15. The bounds on the numbers of each array:

    the norm's output        sqrt(D) x its largest weight + its largest bias
    the activation           none: each row is scaled by its largest number, as it is made
    the output's gradient    the length of its longest row
    the activation's         a row's length x that of the down projection's longest column (Cauchy
                             and Schwarz)
    gate's and up's          the largest, over all rows, of that x the row's largest number of gate
                             and up x 1.13: no activation here is steeper than that, or larger than
                             its input

Weights are cast by their largest numbers. Nothing is kept from step to step.

Shape suffixes: N tokens, D hidden, F features, P = 2 F: gate's and then up's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_bert.model.block import Block
from megatron_bert.model.fp8 import E4M3, E5M2, scaled_product
from megatron_bert.model.fp8_arrays import (
    Scaled,
    activation_rows,
    as_scale,
    cast_gradient,
    cast_weight,
    gate_up_gradients,
    norm_columns,
)
from megatron_bert.model.fused_feed_forward import (
    Branch,
    FeedForwardGradients,
    FeedForwardParameters,
    Kept,
    made_by,
)
from megatron_bert.model.fused_norm import BranchMask, add_branch
from megatron_bert.parallel.gradient_sums import gradient_dtype

# The steepest slope of gelu, at the root of 2; silu's is 1.10.
_STEEPEST = 1.13

# What rounding may add: to numbers in E5M2, to those in E4M3 and to their product in BF16.
_ROUNDED = (1 + 1 / 8) * (1 + 1 / 16) * (1 + 1 / 256)


class Fp8FeedForward:
    """See `FeedForwardPasses`; on one tensor-parallel rank."""

    def forward(
        self, block: Block, x: Tensor, branch: Branch, parameters: FeedForwardParameters
    ) -> tuple[Tensor, Kept]:
        """See `FeedForwardPasses`."""
        network, dtype = block.feed_forward, x.dtype
        scale = x.new_empty(1, dtype=torch.float32)
        x, normed, mean, rstd = add_branch(x, *branch, made_by(block, parameters), scale)
        wide, down = _weight_scales(parameters)
        wide_ND = cast_weight((parameters.gate, parameters.up), wide, columns=False)
        gate_up = scaled_product(normed, wide_ND.t(), scale, wide, dtype, fast=True)
        active, largest_N = activation_rows(gate_up, parameters.wide_biases, network.activation)
        down_DF = cast_weight((parameters.down,), down, columns=False)
        # Where one factor has a scale for each row, the other must have one for each column.
        down_scales = down.expand(1, len(down_DF)).contiguous()
        y = scaled_product(active.numbers, down_DF.t(), active.scale, down_scales, dtype, fast=True)
        others = (gate_up, scale, wide, down, active.scale.amax().view(1), largest_N)
        return y, Kept(x, mean, rstd, others)

    def backward(
        self,
        block: Block,
        end_grad: Tensor,
        mask: BranchMask,
        kept: Kept,
        parameters: FeedForwardParameters,
        known: FeedForwardParameters,
    ) -> FeedForwardGradients:
        """See `FeedForwardPasses`."""
        network, dtype = block.feed_forward, end_grad.dtype
        gate_up, scale, wide, down, active_scale, largest_N = kept.others
        sums = gradient_dtype(known.norm_weight)

        lengths_N = _lengths(end_grad, 1) / (1.0 - mask.dropout)
        y_scale = as_scale(lengths_N.amax(), E5M2)
        y_grad, y_grad_DN, down_bias = cast_gradient(end_grad, y_scale, mask, sums)
        down_FD = cast_weight((parameters.down,), down, columns=True)
        active_grad = scaled_product(y_grad.numbers, down_FD.t(), y_grad.scale, down, dtype)
        gate_up_grad, gate_up_grad_PN, active_FN, wide_biases = gate_up_gradients(
            active_grad,
            gate_up,
            parameters.wide_biases,
            network.activation,
            gate_up_scale(lengths_N, largest_N, parameters.down),
            active_scale,
            sums,
        )
        del active_grad
        down_grad = _weight_gradient(y_grad_DN, active_FN, known.down, dtype)
        del active_FN, y_grad_DN, y_grad
        wide_DP = cast_weight((parameters.gate, parameters.up), wide, columns=True)
        normed_grad = scaled_product(
            gate_up_grad.numbers, wide_DP.t(), gate_up_grad.scale, wide, dtype
        )
        normed_DN = norm_columns(kept.x, kept.mean, kept.rstd, *parameters[:2], scale)
        wide_grad = _weight_gradient(gate_up_grad_PN, normed_DN, known.gate, dtype)
        gate_grad, up_grad = wide_grad.chunk(2)
        gate_bias, up_bias = (None, None) if wide_biases is None else wide_biases
        return FeedForwardGradients(
            normed_grad, (gate_grad, up_grad, down_grad), (gate_bias, up_bias, down_bias)
        )


def gate_up_scale(lengths_N: Tensor, largest_N: Tensor, down_DF: Tensor) -> Tensor:
    """The scale of gate's and up's gradients, fp32 [1]: see the table at the top.

    Args:
        lengths_N: lengths of the rows of the output's gradient, fp32.
        largest_N: the rows' largest numbers of gate and up, fp32.
        down_DF: the down projection.
    """
    row = (lengths_N * largest_N).amax()
    return as_scale(_STEEPEST * _ROUNDED * row * _lengths(down_DF, 0).amax(), E5M2)


def _lengths(x: Tensor, dim: int) -> Tensor:
    """Lengths of rows (`dim` 1) or of columns (`dim` 0), in fp32."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float32)
    return lengths


def _weight_scales(parameters: FeedForwardParameters) -> tuple[Tensor, Tensor]:
    """The scale of gate and up together, and that of down, fp32 [1] each."""
    gate, up, down = (
        torch.linalg.vector_norm(weight, math.inf, dtype=torch.float32)
        for weight in (parameters.gate, parameters.up, parameters.down)
    )
    return as_scale(torch.maximum(gate, up), E4M3), as_scale(down, E4M3)


def _weight_gradient(grad: Scaled, x: Scaled, known: Tensor, dtype: torch.dtype) -> Tensor:
    """y_grad^T x, from both as columns; in fp32 where the weight's gradients accumulate in it."""
    sums = gradient_dtype(known)
    made = sums if sums == torch.float32 else dtype
    return scaled_product(grad.numbers, x.numbers.t(), grad.scale, x.scale, made)
