"""Sums over rows, by a kernel of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bert.parallel import softmax_kernels

_TILE, _COLUMNS, _WARPS = 64, 32, 4


def column_sums(rows_PX: Tensor, dtype: torch.dtype) -> Tensor:
    """Column sums, added up in fp32 in an order that follows from shapes alone, rounded once.

    PyTorch's own kernel takes several times as long for some hundred rows.

    Args:
        rows_PX: [P, X].
        dtype: of what is returned.

    Returns:
        [X].
    """
    (P, X), rows_PX = rows_PX.shape, rows_PX.contiguous()
    sums_X = rows_PX.new_empty(X, dtype=dtype)
    softmax_kernels.column_sums_kernel[(-(-X // _COLUMNS),)](
        rows_PX, sums_X, P, X,
        TILE=_TILE, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return sums_X
