"""A step's gradients on their way to the sums that stand on the parameters.

Autograd adds a gradient to `parameter.grad` once a function has given it. A function that knows the
parameter may add to it ahead of that and give none: a weight's product then adds to the sum what it
computes, which so is not written, read and added; and many small gradients are added by one launch.
The first gradient of a step has no sum yet, unless sums are kept (`ShardedModel.step`).

Shape suffixes: N tokens of the micro-batch, D features in, F features out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bert.parallel.joined import joined_view


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """In which type a parameter's gradients are added up (`ShardedModel.step`)."""
    # Parts of one that is split over ranks are no leaves, and have no such type.
    dtype = parameter.grad_dtype if parameter.is_leaf else None
    return dtype or parameter.dtype


def gradient_sum(parameter: Tensor) -> Tensor | None:
    """What a parameter's gradients were added up to; None where there is nothing yet."""
    return parameter.grad if parameter.is_leaf else None


def added_to_sums(
    parameters: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Add gradients to the sums that there are.

    Args:
        parameters: as autograd knows them; None where there is none.
        gradients: one a parameter; None where there is none.

    Returns:
        For autograd: those that have no sum, and None in place of the others.
    """
    sums = [None if parameter is None else gradient_sum(parameter) for parameter in parameters]
    pairs = zip(sums, gradients, strict=True)
    added = [(a, x.to(a.dtype)) for a, x in pairs if a is not None and x is not None]
    if added:
        totals, addends = zip(*added, strict=True)
        torch._foreach_add_(totals, addends)
    return [x if total is None else None for total, x in zip(sums, gradients, strict=True)]


def weight_gradients(
    y_grad_NF: Tensor, x_ND: Tensor, weights: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Gradients y_grad^T x of weights, [F, D] each, of layers that read one input.

    Added to the sums where there are any, by the product itself on a GPU, of BF16 to sums in fp32.
    Else on a GPU, of BF16, in fp32 where they are added up in that, not rounded before; and in the
    type of what they are made from where no other product is to be had.

    Args:
        y_grad_NF: of what the layers gave, their features side by side.
        x_ND: what they read.
        weights: as autograd knows them.

    Returns:
        One a weight, for autograd; None in place of those that were added.
    """
    sums = _sums_as_one(weights)
    unrounded = x_ND.is_cuda and x_ND.dtype == torch.bfloat16
    if sums is None:
        if unrounded and gradient_dtype(weights[0]) == torch.float32:
            product = torch.mm(y_grad_NF.T, x_ND, out_dtype=torch.float32)
        else:
            product = y_grad_NF.T @ x_ND
        return torch.split(product, [len(weight) for weight in weights])
    if unrounded and sums.dtype == torch.float32:
        torch.addmm(sums, y_grad_NF.T, x_ND, out_dtype=torch.float32, out=sums)
    else:
        sums.add_((y_grad_NF.T @ x_ND).to(sums.dtype))
    return [None] * len(weights)


def _sums_as_one(parameters: Sequence[Tensor]) -> Tensor | None:
    """The sums of all, where they stand end to end."""
    sums = []
    for parameter in parameters:
        total = gradient_sum(parameter)
        if total is None:
            return None
        sums.append(total)
    return joined_view(sums)
