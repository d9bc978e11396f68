"""Column sums, computed by a kernel of our own."""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_bert.config.arithmetic import ceil_div

_TILE, _COLUMNS, _WARPS = 64, 32, 4


def column_sums(rows_PX: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum each column in fp32, in an order that depends on the shapes alone, and round once.

    With a few hundred rows, PyTorch's own kernel takes several times as long.

    Args:
        rows_PX: [P, X].
        dtype: dtype of the result.

    Returns:
        [X].
    """
    (P, X), rows_PX = rows_PX.shape, rows_PX.contiguous()
    sums_X = rows_PX.new_empty(X, dtype=dtype)
    column_sums_kernel[(ceil_div(X, _COLUMNS),)](
        rows_PX, sums_X, P, X,
        TILE=_TILE, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return sums_X


@triton.jit
def column_sums_kernel(ROWS, SUMS, count, size, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of the columns of [count, size], in fp32.

    Grid: tiles of columns.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, TILE)
    offsets = rows[:, None] * size + columns[None, :]
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for first in range(0, count, TILE):
        mask = (first + rows < count)[:, None] & (columns < size)[None, :]
        values = tl.load(ROWS + tl.cast(first, tl.int64) * size + offsets, mask=mask, other=0.0)
        total += values.to(tl.float32)
    tl.store(SUMS + columns, tl.sum(total, 0).to(SUMS.dtype.element_ty), mask=columns < size)
