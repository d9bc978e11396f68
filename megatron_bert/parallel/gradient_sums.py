"""How a step's gradients are added to the sums in `parameter.grad`.

Autograd adds a gradient to `parameter.grad` after a function has returned it. A function that knows
the parameter may instead add to the sum itself and return None. A weight's product then accumulates
into the sum directly, so that the gradient is not written, read back and added; and many small
gradients are added by one launch. The first gradient of a step has no sum yet, unless sums are kept
(`ShardedModel.step`).

A parameter "as autograd knows it" is the tensor that a function was called with, not the one that
`saved_tensors` returns.

Shape suffixes: N tokens of the micro-batch, D features in, F features out, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_bert.parallel.joined import joined_view


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which a parameter's gradients accumulate (`ShardedModel.step`)."""
    # This rank's part of a parameter that is split over ranks is no leaf, and has no such dtype.
    dtype = parameter.grad_dtype if parameter.is_leaf else None
    return dtype or parameter.dtype


def gradient_sum(parameter: Tensor) -> Tensor | None:
    """The sum of a parameter's gradients so far; None if there is none yet."""
    return parameter.grad if parameter.is_leaf else None


def added_to_sums(
    parameters: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Add each gradient to its parameter's sum, if there is one.

    Args:
        parameters: as autograd knows them; None in place of a missing one.
        gradients: one per parameter; None in place of a missing one.

    Returns:
        What to return to autograd: gradients without a sum, and None in place of the others.
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
    """Compute the gradients y_grad^T x of the weights, [F, D] each, of layers that read one input.

    They are added to the weights' sums if these exist and lie end to end in memory. Otherwise they
    are returned: unrounded, in fp32, if gradients accumulate in fp32 and a GPU multiplies BF16;
    else in the dtype of the factors, as there is no other product.

    Args:
        y_grad_NF: gradients of the layers' outputs, their features side by side.
        x_ND: the layers' input.
        weights: as autograd knows them.

    Returns:
        One per weight, for autograd; None in place of those that were added to sums.
    """
    sums = _sums_as_one(weights)
    if sums is None:
        wanted = gradient_dtype(weights[0])
        product = weight_product(y_grad_NF, x_ND, unrounded=wanted == torch.float32)
        return torch.split(product, [len(weight) for weight in weights])
    add_weight_product(sums, y_grad_NF, x_ND)
    return [None] * len(weights)


def weight_product(y_grad_NF: Tensor, x_ND: Tensor, *, unrounded: bool) -> Tensor:
    """y_grad^T x, [F, D]; in fp32 if `unrounded` and the factors are BF16 on a GPU."""
    if unrounded and _sums_in_fp32(x_ND):
        return torch.mm(y_grad_NF.T, x_ND, out_dtype=torch.float32)
    return y_grad_NF.T @ x_ND


def add_weight_product(sums_FD: Tensor, y_grad_NF: Tensor, x_ND: Tensor) -> None:
    """Add y_grad^T x to a sum, within the product if that can write the sum's dtype."""
    if _sums_in_fp32(x_ND) and sums_FD.dtype == torch.float32:
        torch.addmm(sums_FD, y_grad_NF.T, x_ND, out_dtype=torch.float32, out=sums_FD)
    else:
        sums_FD.add_((y_grad_NF.T @ x_ND).to(sums_FD.dtype))


def _sums_in_fp32(x: Tensor) -> bool:
    """Whether products of this dtype can return their fp32 sums without rounding them."""
    return x.is_cuda and x.dtype == torch.bfloat16


def scaled_gradient(parameter: Tensor, gradient: Tensor, scale: Tensor) -> Tensor | None:
    """A gradient times a scale, for autograd; None if it was added to an existing sum.

    Args:
        parameter: as autograd knows it.
        gradient: consumed: it is scaled in place, or its memory is free for reuse.
        scale: fp32 [1].
    """
    total = gradient_sum(parameter)
    if total is None or not total.dtype == gradient.dtype == torch.float32:
        return scaled(gradient, scale)
    total.addcmul_(gradient, scale)
    return None


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply in place by a scale, fp32 [1], in fp32.

    With a scalar tensor, a GPU would round the scale to the dtype of x and multiply in that.
    """
    assert scale.shape == (1,)
    return x.mul_(scale)


def embedding_gradient(hidden_grad_ND: Tensor, ids_N: Tensor, table_VD: Tensor) -> Tensor | None:
    """The gradient of a table whose rows were looked up, for autograd.

    If the table has a sum, the gradient is added to it and None is returned. If there are fewer
    ids than rows, only the rows that were looked up are added, and nothing as large as the table
    is allocated. The order of additions depends on the ids alone.

    Args:
        hidden_grad_ND: gradients of the rows that were looked up.
        ids_N: the ids of these rows.
        table_VD: as autograd knows it.
    """
    total, count, vocab = gradient_sum(table_VD), len(ids_N), len(table_VD)
    assert count
    if total is None or vocab <= count:
        dense = _rows_gradient(hidden_grad_ND, ids_N, vocab)
        return added_to_sums([table_VD], [dense])[0]
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    # Number the ids that occur 0, 1, 2, ... in ascending order.
    is_another = F.pad(sorted_N[1:] != sorted_N[:-1], (1, 0))
    sorted_numbers_N = is_another.cumsum(0)
    numbers_N = torch.empty_like(sorted_numbers_N).scatter_(0, order_N, sorted_numbers_N)
    rows_ND = _rows_gradient(hidden_grad_ND, numbers_N, count)
    # Rows without a number are 0 and may be added to any row, ideally each to another one.
    places_N = torch.arange(count, device=ids_N.device)
    places_N.scatter_(0, sorted_numbers_N, sorted_N.to(places_N.dtype))
    total.index_add_(0, places_N, rows_ND.to(total.dtype))
    return None


def _rows_gradient(hidden_grad_ND: Tensor, ids_N: Tensor, rows: int) -> Tensor:
    """Sum the gradients of each row that was looked up, [rows, D]."""
    gradient: Tensor = torch.ops.aten.embedding_dense_backward(
        hidden_grad_ND, ids_N, rows, -1, False
    )
    return gradient


def _sums_as_one(parameters: Sequence[Tensor]) -> Tensor | None:
    """All parameters' sums as one tensor; None if one is missing or they are not end to end."""
    sums = []
    for parameter in parameters:
        total = gradient_sum(parameter)
        if total is None:
            return None
        sums.append(total)
    return joined_view(sums)
