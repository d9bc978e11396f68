"""Tensors that stand end to end in memory, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined_view(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows of all parts as one tensor, on their memory.

    Args:
        parts: alike except in the number of rows.

    Returns:
        The view; None if the parts are not end to end in memory.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        stands = part.is_contiguous() and part.dtype == first.dtype and part.data_ptr() == end
        if not stands or part.untyped_storage().data_ptr() != storage:
            return None
        end += part.nbytes
    size = (sum(map(len, parts)), *first.shape[1:])
    return first.as_strided(size, first.stride(), first.storage_offset())


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts as one tensor, which shares their memory where it can."""
    view = joined_view(parts)
    return torch.cat(tuple(parts)) if view is None else view
