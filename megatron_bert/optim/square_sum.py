"""The sum of the squares of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def square_sum(gradients: Sequence[Tensor]) -> Tensor:
    """Sum the squares of all elements, to within some 1e-7 of the sum if rows have thousands.

    Args:
        gradients: fp32, one or more, on one device.

    Returns:
        An fp64 scalar.
    """
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(gradients), 2.0)).double().square().sum()
    # A CPU adds numbers one after another, in fp32 unless asked for more: the norm of 64 million
    # numbers then is 0.5 % too small. More takes twenty times as long. Rows are short enough for
    # fp32.
    norms = [
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64 if x.dim() == 1 else None)
        for x in gradients
    ]
    return torch.stack([norm.double().square().sum() for norm in norms]).sum()
