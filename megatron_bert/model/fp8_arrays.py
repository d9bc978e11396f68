"""Arrays in FP8 in the layouts that products read, written by kernels of our own.

A product reads its first factor row by row and its second column by column: in both, what it sums
over is contiguous. So an array is written as rows, as columns (transposed), or as both at once.

Shape suffixes: N tokens, D hidden, F features, P = 2 F: gate's and then up's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.model import fp8_kernels, fused_tiles
from megatron_bert.model.fp8 import E4M3, E5M2, SMALLEST_SCALE, largest_of
from megatron_bert.model.fused_activation import Activation, Biases, is_gelu
from megatron_bert.model.fused_norm import BranchMask, dropping
from megatron_bert.parallel.column_sums import column_sums

# Triton's names of the formats.
_FORMATS = {E4M3: tl.float8e4nv, E5M2: tl.float8e5}


class Scaled(NamedTuple):
    """FP8 numbers, dense, and the scale that turns them back into the values they stand for.

    Attributes:
        numbers: rows, or an array's columns.
        scale: fp32 [1], or [N, 1] with one for each row.
    """

    numbers: Tensor
    scale: Tensor


def as_scale(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale, [1], at which numbers up to a bound, fp32 of one element, fit in a format."""
    # Rounding in earlier steps may exceed a bound by next to nothing.
    return (bound.view(1) * (1.001 / largest_of(dtype))).clamp(min=SMALLEST_SCALE)


def cast_weight(weights: Sequence[Tensor], scale: Tensor, *, columns: bool) -> Tensor:
    """Cast weights [F, D], stacked one below another, to E4M3.

    Args:
        weights: all of one shape.
        scale: fp32 [1].
        columns: write columns, [D, all F], instead of rows.
    """
    (F, D), count = weights[0].shape, len(weights)
    shape = (D, count * F) if columns else (count * F, D)
    numbers = weights[0].new_empty(shape, dtype=E4M3)
    for index, weight in enumerate(weights):
        # A weight's columns are stretches of the columns of all weights.
        part = numbers.view(-1)[index * F * (1 if columns else D) :]
        rows_part, columns_part = (None, part) if columns else (part, None)
        _cast(weight, scale, E4M3, column_length=count * F, rows=rows_part, columns=columns_part)
    return numbers


def cast_gradient(
    grad_ND: Tensor, scale: Tensor, mask: BranchMask, dtype: torch.dtype
) -> tuple[Scaled, Scaled, Tensor | None]:
    """The gradient of a branch's output in E5M2, from that of the sum it was added to.

    Args:
        grad_ND: [N, D], gradient of that sum.
        scale: fp32 [1].
        mask: the branch's dropout.
        dtype: dtype of the bias's gradient.

    Returns:
        Rows; columns; the gradient of the branch's bias, [D], if it has one.
    """
    N, D = grad_ND.shape
    rows, columns = (grad_ND.new_empty(shape, dtype=E5M2) for shape in ((N, D), (D, N)))
    sums = _cast(
        grad_ND.contiguous(), scale, E5M2, rows=rows, columns=columns, column_length=N, mask=mask
    )
    bias = None if sums is None else column_sums(sums, dtype)
    return Scaled(rows, scale), Scaled(columns, scale), bias


def _cast(
    x: Tensor,
    scale: Tensor,
    made: torch.dtype,
    *,
    column_length: int,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    mask: BranchMask | None = None,
) -> Tensor | None:
    """Write x [T, D] as rows, as columns, or as both.

    Args:
        x: dense.
        scale: fp32 [1].
        made: E4M3 or E5M2.
        column_length: numbers from one column to the next.
        rows: where they are written.
        columns: where they are written.
        mask: dropout that is applied to x first.

    Returns:
        Parts of x's column sums, fp32, where the mask has a bias.
    """
    T, D = x.shape
    # Columns are written four numbers at a time.
    assert T % 4 == 0
    assert x.is_contiguous()
    draws, sums = ((), False) if mask is None else (mask.draws, mask.has_bias)
    tile = fused_tiles.ROW_TILING.fp8
    tiles = ceil_div(D, tile.columns)
    programs = tile.programs(T, max(1, fused_tiles.ROW_TILING.fp8_programs // tiles))
    parts = x.new_empty((programs if sums else 0, D), dtype=torch.float32)
    fp8_kernels.fp8_cast_kernel[(programs * tiles,)](
        x, scale, *(draws or (x, x)), x if rows is None else rows,
        x if columns is None else columns.view(torch.int32), parts, T, D, column_length,
        *dropping(mask), FORMAT=_FORMATS[made], DROPOUT=bool(draws), SUMS=sums,
        HAS_ROWS=rows is not None, HAS_COLUMNS=columns is not None, **tile.options(loops=True),
    )  # fmt: skip
    return parts if sums else None


def norm_columns(
    x_ND: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
) -> Scaled:
    """Compute a norm's output again, as columns [D, N] in E4M3.

    Args:
        x_ND: the norm's input.
        mean: as `add_branch` returned it, like the next.
        rstd: the same.
        weight: [D], the norm's.
        bias: [D] or None.
        scale: the scale that `add_branch` wrote.
    """
    (N, D), tile = x_ND.shape, fused_tiles.ROW_TILING.fp8
    assert N % 4 == 0
    assert x_ND.is_contiguous()
    columns = x_ND.new_empty((D, N), dtype=E4M3)
    fp8_kernels.fp8_norm_columns_kernel[(ceil_div(N, tile.tokens) * ceil_div(D, tile.columns),)](
        x_ND, mean, rstd, weight, x_ND if bias is None else bias, scale,
        columns.view(torch.int32), N, D, FORMAT=_FORMATS[E4M3], HAS_BIAS=bias is not None,
        **tile.options(),
    )  # fmt: skip
    return Scaled(columns, scale)


def activation_rows(
    gate_up_NP: Tensor, biases: Biases, activation: Activation
) -> tuple[Scaled, Tensor]:
    """activation(gate + bias) * (up + bias), [N, F] in E4M3, each row with a scale.

    Args:
        gate_up_NP: as `gated_activation` takes it, like the following.
        biases: the same.
        activation: the same.

    Returns:
        The rows, and the largest absolute value of each row of gate and up with their biases:
        fp32 [N].
    """
    N, size = len(gate_up_NP), gate_up_NP.shape[1] // 2
    rows = gate_up_NP.new_empty((N, size), dtype=E4M3)
    scales, largest = (gate_up_NP.new_empty(N, dtype=torch.float32) for _ in range(2))
    tile = fused_tiles.ROW_TILING.whole_rows(size)
    fp8_kernels.fp8_gated_activation_kernel[(ceil_div(N, tile.tokens),)](
        gate_up_NP, *(biases or (gate_up_NP, gate_up_NP)), rows, scales, largest, N, size,
        largest_of(E4M3), SMALLEST_SCALE, BIASES=biases is not None, GELU=is_gelu(activation),
        **tile.options(),
    )  # fmt: skip
    return Scaled(rows, scales.view(-1, 1)), largest


def gate_up_gradients(
    active_grad_NF: Tensor,
    gate_up_NP: Tensor,
    biases: Biases,
    activation: Activation,
    grad_scale: Tensor,
    active_scale: Tensor,
    dtype: torch.dtype,
) -> tuple[Scaled, Scaled, Scaled, Tensor | None]:
    """Compute gradients from that of the activation, and the activation again.

    Args:
        active_grad_NF: [N, F].
        gate_up_NP: as `gated_activation` took them, like the following.
        biases: the same.
        activation: the same.
        grad_scale: fp32 [1], of gate's and up's gradients.
        active_scale: fp32 [1], of the activation.
        dtype: of the biases' gradients.

    Returns:
        The gradients of gate and up in E5M2 as rows, [N, P], and as columns, [P, N]; the activation
        in E4M3 as columns, [F, N]; the gradients of the biases, [2, F], where there are any.
    """
    (N, size), tile = active_grad_NF.shape, fused_tiles.ROW_TILING.fp8_gradient
    assert N % 4 == 0
    assert active_grad_NF.is_contiguous()
    assert gate_up_NP.is_contiguous()
    rows = torch.empty_like(gate_up_NP, dtype=E5M2)
    columns = gate_up_NP.new_empty((2 * size, N), dtype=E5M2)
    active = gate_up_NP.new_empty((size, N), dtype=E4M3)
    tiles = ceil_div(size, tile.columns)
    programs = tile.programs(N, max(1, fused_tiles.ROW_TILING.fp8_programs // tiles))
    parts = gate_up_NP.new_empty((programs if biases else 0, 2, size), dtype=torch.float32)
    fp8_kernels.fp8_gated_activation_gradient_kernel[(programs * tiles,)](
        active_grad_NF, gate_up_NP, *(biases or (gate_up_NP, gate_up_NP)), grad_scale,
        active_scale, rows, columns.view(torch.int32), active.view(torch.int32), parts, N, size,
        FORMAT=_FORMATS[E4M3], GRAD_FORMAT=_FORMATS[E5M2], BIASES=biases is not None,
        GELU=is_gelu(activation), **tile.options(loops=True),
    )  # fmt: skip
    sums = column_sums(parts.flatten(1), dtype).view(2, size) if biases else None
    return Scaled(rows, grad_scale), Scaled(columns, grad_scale), Scaled(active, active_scale), sums
