"""A step's gradients on their way to the sums that stand on the parameters.

Autograd adds a gradient to `parameter.grad` once a function has given it. A function that knows the
parameter may add to it ahead of that and give none: a weight's product then adds to the sum what it
computes, which so is not written, read and added; and many small gradients are added by one launch.
The first gradient of a step has no sum yet, unless sums are kept (`ShardedModel.step`).

Shape suffixes: N tokens of the micro-batch, D features in, F features out, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

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

    Added to the sums where there are any. Else in fp32, not rounded before, where they are added up
    in that and a GPU multiplies BF16, and in the type of what they are made from where no other
    product is to be had.

    Args:
        y_grad_NF: of what the layers gave, their features side by side.
        x_ND: what they read.
        weights: as autograd knows them.

    Returns:
        One a weight, for autograd; None in place of those that were added.
    """
    sums = _sums_as_one(weights)
    if sums is None:
        wanted = gradient_dtype(weights[0])
        product = weight_product(y_grad_NF, x_ND, unrounded=wanted == torch.float32)
        return torch.split(product, [len(weight) for weight in weights])
    add_weight_product(sums, y_grad_NF, x_ND)
    return [None] * len(weights)


def weight_product(y_grad_NF: Tensor, x_ND: Tensor, *, unrounded: bool) -> Tensor:
    """y_grad^T x, [F, D]; if so asked, of BF16 on a GPU in fp32."""
    if unrounded and _sums_in_fp32(x_ND):
        return torch.mm(y_grad_NF.T, x_ND, out_dtype=torch.float32)
    return y_grad_NF.T @ x_ND


def add_weight_product(sums_FD: Tensor, y_grad_NF: Tensor, x_ND: Tensor) -> None:
    """Add y_grad^T x to a sum; the product does it where it can give the sum's type."""
    if _sums_in_fp32(x_ND) and sums_FD.dtype == torch.float32:
        torch.addmm(sums_FD, y_grad_NF.T, x_ND, out_dtype=torch.float32, out=sums_FD)
    else:
        sums_FD.add_((y_grad_NF.T @ x_ND).to(sums_FD.dtype))


def _sums_in_fp32(x: Tensor) -> bool:
    """Whether there are products of this type that give what they add up, in fp32."""
    return x.is_cuda and x.dtype == torch.bfloat16


def scaled_gradient(parameter: Tensor, gradient: Tensor, scale: Tensor) -> Tensor | None:
    """A gradient times a scale, for autograd; None where it was added to the sum that there is.

    Args:
        parameter: as autograd knows it.
        gradient: used up: it is scaled in place, or free.
        scale: fp32 [1].
    """
    total = gradient_sum(parameter)
    if total is None or not total.dtype == gradient.dtype == torch.float32:
        return scaled(gradient, scale)
    total.addcmul_(gradient, scale)
    return None


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply in place by a scale, fp32 [1], in fp32.

    By a scalar tensor a GPU would multiply in the type of x, and round the scale to that before.
    """
    assert scale.shape == (1,)
    return x.mul_(scale)


def embedding_gradient(hidden_grad_ND: Tensor, ids_N: Tensor, table_VD: Tensor) -> Tensor | None:
    """The gradient of a table of which rows were looked up, for autograd.

    Where it has a sum, None: only rows that were looked up are added to it, and nothing as large
    as the table is made. The order of additions follows from the ids alone.

    Args:
        hidden_grad_ND: of the rows that were looked up.
        ids_N: which.
        table_VD: as autograd knows it.
    """
    total, count, vocab = gradient_sum(table_VD), len(ids_N), len(table_VD)
    assert count
    if total is None or vocab <= count:
        dense = _rows_gradient(hidden_grad_ND, ids_N, vocab)
        return added_to_sums([table_VD], [dense])[0]
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    # As the ids, but without those that do not occur.
    is_another = F.pad(sorted_N[1:] != sorted_N[:-1], (1, 0))
    sorted_numbers_N = is_another.cumsum(0)
    numbers_N = torch.empty_like(sorted_numbers_N).scatter_(0, order_N, sorted_numbers_N)
    rows_ND = _rows_gradient(hidden_grad_ND, numbers_N, count)
    # Rows that no number has are 0 and may be added to any, best to one each.
    places_N = torch.arange(count, device=ids_N.device)
    places_N.scatter_(0, sorted_numbers_N, sorted_N.to(places_N.dtype))
    total.index_add_(0, places_N, rows_ND.to(total.dtype))
    return None


def _rows_gradient(hidden_grad_ND: Tensor, ids_N: Tensor, rows: int) -> Tensor:
    """Sums of the gradients of each row that was looked up, [rows, D]."""
    gradient: Tensor = torch.ops.aten.embedding_dense_backward(
        hidden_grad_ND, ids_N, rows, -1, False
    )
    return gradient


def _sums_as_one(parameters: Sequence[Tensor]) -> Tensor | None:
    """The sums of all, where they stand end to end."""
    sums = []
    for parameter in parameters:
        total = gradient_sum(parameter)
        if total is None:
            return None
        sums.append(total)
    return joined_view(sums)
