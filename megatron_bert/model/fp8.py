"""Products of linear layers in FP8 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning").

They use PyTorch's own scaled products, so that the compiler sees everything: finding the largest
number, scaling and casting are fused with what precedes a product. Operands of the forward pass are
in E4M3 (three bits after the point), gradients in E5M2 (two, for their wider range).

Shape suffixes: N tokens, D features in, F features out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
# The least scale: none could be made from numbers that are next to nothing.
SMALLEST_SCALE = 1e-30
_SMALLEST_OF_A_WHOLE = torch.finfo(torch.float32).tiny


def fp8_linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """Compute x W^T + b, and its gradients, as products of FP8 numbers with sums in fp32.

    Each operand is scaled as a whole, so that its largest number at that moment becomes the
    format's largest; no history is kept. Biases and their gradients are not in FP8.

    Args:
        x_ND: [N, D]; on CUDA in BF16, with N, D and F multiples of 16.
        weight_FD: [F, D], of the same type.
        bias_F: [F] or None.

    Returns:
        [N, F], of the type of x.
    """
    y_NF: Tensor = _Linear.apply(x_ND, weight_FD, bias_F)  # type: ignore[no-untyped-call]
    return y_NF


class _Linear(torch.autograd.Function):
    """Keeps x as it was cast; the weight is there anyway, and is cast again in backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        x_scale, weight_scale = _scale(x_ND, E4M3), _scale(weight_FD, E4M3)
        scaled_ND = _cast(x_ND, x_scale, E4M3)
        scaled_FD = _cast(weight_FD, weight_scale, E4M3)
        ctx.save_for_backward(scaled_ND, x_scale, weight_FD, weight_scale)
        ctx.has_bias = bias_F is not None
        # On request, Hopper accumulates in fewer bits within a tile: enough forward, not backward.
        return scaled_product(
            scaled_ND, scaled_FD.t(), x_scale, weight_scale, x_ND.dtype, bias_F, fast=True
        )

    @staticmethod
    def backward(ctx: Any, *grads_NF: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NF,) = grads_NF
        x_ND, x_scale, weight_FD, weight_scale = ctx.saved_tensors
        grad_scale = _scale(grad_NF, E5M2)
        scaled_NF = _cast(grad_NF, grad_scale, E5M2)
        scaled_FD = _cast(weight_FD, weight_scale, E4M3)
        x_grad_ND = scaled_product(
            scaled_NF, _column_major(scaled_FD), grad_scale, weight_scale, grad_NF.dtype
        )
        weight_grad_FD = scaled_product(
            scaled_NF.t().contiguous(), _column_major(x_ND), grad_scale, x_scale, grad_NF.dtype
        )
        return x_grad_ND, weight_grad_FD, grad_NF.sum(0) if ctx.has_bias else None


def largest_of(dtype: torch.dtype) -> float:
    """A format's largest number."""
    return float(torch.finfo(dtype).max)


def _scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor, fp32 [], that turns numbers of `dtype` back into those of x."""
    largest = x.abs().amax().float()
    # Never 0, even if x is all 0 or its largest number is next to nothing.
    return (largest / largest_of(dtype)).clamp(min=_SMALLEST_OF_A_WHOLE)


def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # The quotient exceeds the format's largest number by fp32's rounding at most, and is rounded
    # back to it. Products read their first factor row by row.
    return (x.float() / scale).to(dtype).contiguous()


def _column_major(x: Tensor) -> Tensor:
    """The same matrix stored column by column, as a product's second factor must be."""
    return x.t().contiguous().t()


def scaled_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    fast: bool = False,
) -> Tensor:
    """The product a b of FP8 numbers, added up in fp32.

    Args:
        a: [N, D], dense rows.
        b: [D, F], dense columns.
        a_scale: what a's numbers are multiplied by, fp32 of one element, or [N, 1].
        b_scale: the same for b's; one element where a's has one, or [1, F].
        dtype: dtype of the product.
        bias: [F], added before the product is rounded.
        fast: let Hopper accumulate in fewer bits within a tile.

    Returns:
        [N, F].
    """
    # The public F.scaled_mm computes the same, but not every PyTorch from 2.11 on can trace it.
    return torch._scaled_mm(a, b, a_scale, b_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast)
