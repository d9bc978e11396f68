r"""Column- and row-parallel linear layers (Shoeybi et al. 2019, "Megatron-LM", section 3).

A weight is stored as in `nn.Linear`, [out, in]. Over two ranks

    column-parallel          [W_0]                 row-parallel
    y = x W^T,          W =  [---],                y = x W^T,   W = [W_0 | W_1],
    y = [y_0 | y_1]          [W_1]                 y = x_0 W_0^T + x_1 W_1^T

so that column-parallel, a pointwise function or attention, then row-parallel needs one
all-reduce forward (in the row-parallel layer) and one backward (in the column-parallel one).
Where the ranks share the tokens between such pairs (sequence parallelism, Korthikanti et al. 2022,
section 4.2.2), the first gathers them and the second sums and scatters: the same number of bytes
travel, and what lies between the pairs is held once instead of on every rank.

Shape suffixes: T tokens that a rank holds, N tokens of the micro-batch (T, or T x ranks), D
features in, F features out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.distributed.collectives import (
    reduce_from_group,
    reduce_scatter_from_group,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.parallel.deferred import (
    WeightProducts,
    WeightQueue,
    linear_with_deferred_weight,
)
from megatron_bert.parallel.gradient_sums import weight_gradients
from megatron_bert.parallel.joined import joined_rows
from megatron_bert.parallel.partial_gradients import mark_partial
from megatron_bert.parallel.sharding import local_part, make_parameter

LinearProduct: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Computes x W^T + b, backward too, in place of PyTorch; x is [N, D], W [F, D], b [F] or None."""


class ColumnParallelLinear(nn.Module):
    """Weight and bias of y = x W^T + b whose output features are split over the ranks.

    With `replicated=True` every rank holds all of it (for key and value heads that do not divide
    over the ranks); each rank's heads then contribute a part of its gradient.

    Layers that read the same input are computed together by `column_parallel`, or by a fused block.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TensorParallelGroup,
        *,
        bias: bool = True,
        replicated: bool = False,
    ) -> None:
        super().__init__()
        dim = None if replicated else 0
        self.weight = make_parameter((out_features, in_features), tp, dim)
        self.bias = make_parameter((out_features,), tp, dim) if bias else None
        self.deferred: WeightQueue | None = None
        self.product: LinearProduct | None = None
        if replicated:
            mark_partial(self, *(name for name, _ in self.named_parameters()))

    def local_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that this rank computes with."""
        return local_part(self.weight), None if self.bias is None else local_part(self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b whose input features are split over the ranks; the bias is added once."""

    def __init__(
        self, in_features: int, out_features: int, tp: TensorParallelGroup, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = make_parameter((out_features, in_features), tp, 1)
        self.bias = make_parameter((out_features,), tp) if bias else None
        self.deferred: WeightQueue | None = None
        self.product: LinearProduct | None = None
        self.group = tp.group
        self.shards_tokens = tp.shards_tokens
        if bias and tp.shards_tokens:
            mark_partial(self, "bias")

    def forward(self, x_NF: Tensor) -> Tensor:
        """[N, in / tp] -> [T, out], the tokens that this rank holds."""
        weight = local_part(self.weight)
        if self.group.size() == 1:
            return _linear(self, x_NF, weight, self.bias)
        reduce = reduce_scatter_from_group if self.shards_tokens else reduce_from_group
        y_TD = reduce(_linear(self, x_NF, weight), self.group)
        return y_TD if self.bias is None else y_TD + self.bias


def column_parallel(
    x_TD: Tensor,
    layers: tuple[ColumnParallelLinear, ...],
    tp: TensorParallelGroup,
) -> tuple[Tensor, ...]:
    """Apply several column-parallel layers to one input.

    In backward, the collective on the input's gradient overlaps the weight-gradient GEMMs, which
    two separate functions around one linear layer could not do; and the gathering of shared tokens
    overlaps the input-gradient GEMMs.

    Args:
        x_TD: [T, in], the tokens that this rank holds.
        layers: layers of `in` input features.
        tp: the ranks.

    Returns:
        One tensor [N, out / tp] per layer.
    """
    pairs = [layer.local_parameters() for layer in layers]
    if tp.size == 1:
        return tuple(_linear(layer, x_TD, *pair) for layer, pair in zip(layers, pairs, strict=True))
    if layers[0].product is not None:
        x_ND = _GivenToProducts.apply(x_TD, tp.group, tp.shards_tokens)  # type: ignore[no-untyped-call]
        return tuple(_linear(layer, x_ND, *pair) for layer, pair in zip(layers, pairs, strict=True))
    weights, biases = zip(*pairs, strict=True)
    deferring = None
    if layers[0].deferred is not None:
        # The weights' gradients do not pass through this function.
        deferring, weights = layers, tuple(weight.detach() for weight in weights)
    return _ColumnParallel.apply(  # type: ignore[no-any-return,no-untyped-call]
        x_TD, tp.group, tp.shards_tokens, deferring, *weights, *biases
    )


def _linear(
    layer: ColumnParallelLinear | RowParallelLinear,
    x_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    if layer.product is not None:
        return layer.product(x_ND, weight, bias)
    if layer.deferred is None:
        return F.linear(x_ND, weight, bias)
    return linear_with_deferred_weight(layer, x_ND, weight, bias)


class _GivenToProducts(torch.autograd.Function):
    """All tokens, as input to column-parallel products with a backward pass of their own.

    In backward the ranks' parts of the gradient are summed, and nothing overlaps that collective.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: dist.ProcessGroup, shards_tokens: bool) -> Tensor:
        ctx.group, ctx.shards_tokens = group, shards_tokens
        return wait(start_all_gather(x_TD, group)) if shards_tokens else x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads_ND: Tensor) -> tuple[Tensor | None, ...]:
        start = start_reduce_scatter if ctx.shards_tokens else start_all_reduce
        return wait(start(grads_ND[0], ctx.group)), None, None


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        group: dist.ProcessGroup,
        shards_tokens: bool,
        deferring: tuple[ColumnParallelLinear, ...] | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights, biases = cast(tuple[Tensor, ...], parameters[:count]), parameters[count:]
        ctx.group, ctx.shards_tokens, ctx.deferring = group, shards_tokens, deferring
        ctx.has_biases = [bias is not None for bias in biases]
        # If the ranks share the tokens, each keeps its own; they are gathered again in backward.
        ctx.save_for_backward(x_TD, *weights)
        x_ND = wait(start_all_gather(x_TD, group)) if shards_tokens else x_TD
        return tuple(F.linear(x_ND, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        group, shards_tokens, layers = ctx.group, ctx.shards_tokens, ctx.deferring

        def weight_grads(x_ND: Tensor) -> Sequence[Tensor | None]:
            if layers is None:
                return [grad_NF.T @ x_ND for grad_NF in grads_NF]
            return _defer(layers, x_TD, grads_NF, group if shards_tokens else None)

        x_grad, w_grads = _overlapping_gradients(
            x_TD,
            group,
            lambda: _sum_of_products(grads_NF, weights),
            weight_grads,
            shares_tokens=shards_tokens,
            gathers_tokens=shards_tokens and layers is None,
        )
        bias_grads = [
            grad_NF.sum(0) if has_bias else None
            for grad_NF, has_bias in zip(grads_NF, ctx.has_biases, strict=True)
        ]
        return x_grad, None, None, None, *w_grads, *bias_grads


def joined_gradients(
    grad_NF: Tensor,
    x_TD: Tensor,
    weights: Sequence[Tensor],
    layers: Sequence[ColumnParallelLinear],
    tp: TensorParallelGroup,
    known: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Gradients of column-parallel layers that were computed by one product of their weights.

    The collectives overlap products as in `column_parallel`.

    Args:
        grad_NF: [N, F], gradient of all layers' features side by side.
        x_TD: [T, in], the layers' input, for the tokens that this rank holds.
        weights: [out / tp, in] each.
        layers: the layers; if they defer their weight products, these are deferred.
        tp: the ranks.
        known: the weights as autograd knows them.

    Returns:
        The input's gradient, [T, in], and the weights' gradients, for autograd: None in place of
        those that were deferred or added to their sums.
    """
    shares_tokens, defers = tp.size > 1 and tp.shards_tokens, layers[0].deferred is not None

    def weight_grads(x_ND: Tensor) -> Sequence[Tensor | None]:
        if not defers:
            return weight_gradients(grad_NF, x_ND, known)
        return _defer(layers, x_TD, [grad_NF], tp.group if shares_tokens else None, joined=True)

    return _overlapping_gradients(
        x_TD,
        tp.group if tp.size > 1 else None,
        lambda: grad_NF @ joined_rows(weights),
        weight_grads,
        shares_tokens=shares_tokens,
        gathers_tokens=shares_tokens and not defers,
    )


def _overlapping_gradients(
    x_TD: Tensor,
    group: dist.ProcessGroup | None,
    input_grad: Callable[[], Tensor],
    weight_grads: Callable[[Tensor], Sequence[Tensor | None]],
    *,
    shares_tokens: bool,
    gathers_tokens: bool,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """A column-parallel layer's backward pass: each collective runs beside the other's products.

    Args:
        x_TD: the layer's input, for the tokens that this rank holds.
        group: the ranks that hold a part of the layer each; None for one that holds all of it.
        input_grad: computes this rank's part of the input's gradient, [N, D].
        weight_grads: computes the weights' gradients from x_ND, or defers them.
        shares_tokens: whether the ranks share the tokens.
        gathers_tokens: whether `weight_grads` needs those of all ranks; else it is given x_TD.

    Returns:
        The input's gradient, [T, D], and what `weight_grads` returned.
    """
    gathering = start_all_gather(x_TD, group) if group is not None and gathers_tokens else None
    x_grad_ND = input_grad()
    x_ND = x_TD if gathering is None else wait(gathering)
    if group is None:
        return x_grad_ND, weight_grads(x_ND)
    start = start_reduce_scatter if shares_tokens else start_all_reduce
    reducing = start(x_grad_ND, group)
    w_grads = weight_grads(x_ND)
    return wait(reducing), w_grads


def _sum_of_products(grads_NF: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    x_grad_ND = grads_NF[0] @ weights[0]
    for grad_NF, weight in zip(grads_NF[1:], weights[1:], strict=True):
        x_grad_ND = x_grad_ND + grad_NF @ weight
    return x_grad_ND


def _defer(
    layers: Sequence[ColumnParallelLinear],
    x_TD: Tensor,
    grads_NF: Sequence[Tensor],
    sharing: dist.ProcessGroup | None,
    *,
    joined: bool = False,
) -> Sequence[None]:
    """Leave the weights' products to `accumulate_deferred`; see `WeightProducts`."""
    queue = layers[0].deferred
    assert queue is not None
    queue.append(WeightProducts(layers, x_TD, grads_NF, sharing, joined=joined))
    return [None] * len(layers)


def gathered_tokens(x_TD: Tensor, tp: TensorParallelGroup) -> Tensor:
    """[T, ...] -> [N, ...], without a gradient: the tokens of all ranks, where they share them."""
    return wait(start_all_gather(x_TD, tp.group)) if tp.size > 1 and tp.shards_tokens else x_TD


def summed_over_ranks(y_ND: Tensor, tp: TensorParallelGroup) -> Tensor:
    """[N, ...] -> [T, ...], without a gradient: the sum over ranks, of this rank's tokens."""
    if tp.size == 1:
        return y_ND
    start = start_reduce_scatter if tp.shards_tokens else start_all_reduce
    return wait(start(y_ND, tp.group))
