"""The sum of the squares of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def square_sum(gradients: Sequence[Tensor]) -> Tensor:
    """Sum the squares of all elements, to some 1e-7 of it if rows have thousands; fp64, a scalar.

    Args:
        gradients: fp32, one or more, on one device.
    """
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(gradients), 2.0)).double().square().sum()
    # A CPU adds up what it is given one number after another, in fp32 unless it is asked for more,
    # which takes it twenty times as long: of 64 million numbers the norm is 0.5 % too small then.
    # Rows are short enough.
    norms = [
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64 if x.dim() == 1 else None)
        for x in gradients
    ]
    return torch.stack([norm.double().square().sum() for norm in norms]).sum()
