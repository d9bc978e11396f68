r"""Column- and row-parallel linear layers (Shoeybi et al. 2019, "Megatron-LM", section 3).

A weight is stored as in `nn.Linear`, [out, in]. Over two ranks

    column-parallel          [W_0]                 row-parallel
    y = x W^T,          W =  [---],                y = x W^T,   W = [W_0 | W_1],
    y = [y_0 | y_1]          [W_1]                 y = x_0 W_0^T + x_1 W_1^T

so that column-parallel, a pointwise function or attention, then row-parallel needs one
all-reduce forward (in the row-parallel layer) and one backward (in the column-parallel one).
Where the ranks share the tokens between such pairs (sequence parallelism, Korthikanti et al. 2022,
section 4.2.2), the first gathers them and the second sums and scatters: as many bytes travel, and
what stands between the pairs is held once and not on every rank.

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
    linear_with_own_gradients,
    weight_gradients,
)
from megatron_bert.parallel.partial_gradients import mark_partial
from megatron_bert.parallel.sharding import local_part, make_parameter

LinearProduct: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Computes x W^T + b in place of PyTorch, backward too: of x [N, D], W [F, D], b [F] or None."""


class ColumnParallelLinear(nn.Module):
    """Weight and bias of y = x W^T + b whose output features are split over the ranks.

    With `replicated=True` every rank holds all of it (the key and value heads that do not divide
    over the ranks); each rank's heads then give a part of its gradient.

    Layers that read the same input are computed together by `column_parallel`.
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
        y_TD = self.sum_over_ranks(_linear(self, x_NF, weight))
        return y_TD if self.bias is None else y_TD + self.bias

    def without_bias(self, x_NF: Tensor) -> Tensor:
        """[N, in / tp] -> [T, out], to which the bias is still to be added."""
        return self.sum_over_ranks(linear_with_own_gradients(self, x_NF, local_part(self.weight)))

    def sum_over_ranks(self, y_ND: Tensor) -> Tensor:
        """[N, out], the product of this rank's input features -> [T, out], that of all."""
        reduce = reduce_scatter_from_group if self.shards_tokens else reduce_from_group
        return reduce(y_ND, self.group)


def column_parallel(
    x_TD: Tensor,
    layers: tuple[ColumnParallelLinear, ...],
    tp: TensorParallelGroup,
) -> tuple[Tensor, ...]:
    """Apply several column-parallel layers to one input.

    Backward, the collective of the input's gradient runs under the weights' gradient GEMMs, which
    two separate functions around one linear layer could not do; so does the gathering of shared
    tokens under the input's gradient GEMMs.

    Args:
        x_TD: [T, in], the tokens that this rank holds.
        layers: layers of `in` input features.
        tp: the ranks.

    Returns:
        One tensor [N, out / tp] a layer.
    """
    pairs = [layer.local_parameters() for layer in layers]
    if tp.size == 1:
        return tuple(_linear(layer, x_TD, *pair) for layer, pair in zip(layers, pairs, strict=True))
    if layers[0].product is not None:
        x_ND = _GivenToProducts.apply(x_TD, tp.group, tp.shards_tokens)  # type: ignore[no-untyped-call]
        return tuple(_linear(layer, x_ND, *pair) for layer, pair in zip(layers, pairs, strict=True))
    return _applied(x_TD, layers, tp, pairs, joined=False)


def joined_column_parallel(
    x_TD: Tensor,
    layers: tuple[ColumnParallelLinear, ...],
    tp: TensorParallelGroup,
    *,
    with_biases: bool = True,
    bias_gradients: bool = True,
) -> Tensor:
    """Apply several column-parallel layers to one input, by one product.

    A narrow product takes as long as its input takes to be read, and each product that reads the
    input gives a gradient of it that has to be written, read and added to the others. The weights
    are laid end to end for the product, forward and again backward, and are not kept so.

    Args:
        x_TD: [T, in], the tokens that this rank holds.
        layers: layers of `in` input features, all of them with a bias or none, without a `product`
            of their own.
        tp: the ranks.
        with_biases: False leaves them to be added by whoever reads what is returned.
        bias_gradients: False leaves their gradients, the column sums of that of what is returned,
            to whoever reads it.

    Returns:
        [N, the sum of out / tp], the layers' features side by side.
    """
    assert all(layer.product is None for layer in layers)
    assert len({layer.bias is None for layer in layers}) == 1
    pairs = [layer.local_parameters() for layer in layers]
    if not with_biases:
        pairs = [(weight, None) for weight, _ in pairs]
    elif not bias_gradients:
        pairs = [(weight, None if bias is None else bias.detach()) for weight, bias in pairs]
    return _applied(x_TD, layers, tp, pairs, joined=True)[0]


def _applied(
    x_TD: Tensor,
    layers: tuple[ColumnParallelLinear, ...],
    tp: TensorParallelGroup,
    pairs: Sequence[tuple[Tensor, Tensor | None]],
    *,
    joined: bool,
) -> tuple[Tensor, ...]:
    weights, biases = zip(*pairs, strict=True)
    deferring = None
    if layers[0].deferred is not None:
        # Their gradients do not come by way of this function.
        deferring, weights = layers, tuple(weight.detach() for weight in weights)
    ranks = (tp.group, tp.shards_tokens) if tp.size > 1 else (None, False)
    return _ColumnParallel.apply(  # type: ignore[no-any-return,no-untyped-call]
        x_TD, *ranks, deferring, joined, *weights, *biases
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
    return linear_with_own_gradients(layer, x_ND, weight, bias)


class _GivenToProducts(torch.autograd.Function):
    """What column-parallel products that have a backward pass of their own read: all tokens.

    Backward the gradient, a part from each rank, is summed, and nothing runs beside that.
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
    """Products of one input: one a layer, or with `joined` one of the weights laid end to end.

    The weights that are kept are the layers' own. Of one that was kept joined nobody could free
    the storage, as `fully_shard` does with gathered parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        group: dist.ProcessGroup | None,
        shards_tokens: bool,
        deferring: tuple[ColumnParallelLinear, ...] | None,
        joined: bool,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights, biases = cast(tuple[Tensor, ...], parameters[:count]), parameters[count:]
        ctx.group, ctx.shards_tokens, ctx.deferring = group, shards_tokens, deferring
        ctx.learns_biases, ctx.joined = ctx.needs_input_grad[-count:], joined
        # The parameter itself: what is saved and unpacked does not know its gradients' type.
        ctx.parameter = weights[0]
        # Of shared tokens each rank keeps its own; they are gathered again backward.
        ctx.save_for_backward(x_TD, *weights)
        x_ND = x_TD
        if shards_tokens and group is not None:
            x_ND = wait(start_all_gather(x_TD, group))
        if joined:
            has_biases = biases[0] is not None
            biases = (torch.cat(cast(tuple[Tensor, ...], biases)),) if has_biases else (None,)
            weights = (torch.cat(weights),)
        return tuple(F.linear(x_ND, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads_NF: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        group, shards_tokens, deferring = ctx.group, ctx.shards_tokens, ctx.deferring
        sizes = [len(weight) for weight in weights]
        gathers = shards_tokens and deferring is None
        gathering = start_all_gather(x, group) if gathers else x
        x_grad_ND = _input_gradient(grads_NF, [torch.cat(weights)] if ctx.joined else weights)
        x_ND = wait(gathering) if gathers else x
        if group is not None:
            start = start_reduce_scatter if shards_tokens else start_all_reduce
            reducing = start(x_grad_ND, group)
        weight_grads: Sequence[Tensor | None]
        if deferring is None:
            weight_grads = weight_gradients(x_ND, grads_NF, sizes, ctx.parameter)
        else:
            weight_grads = [None] * len(weights)
            gathered = group if shards_tokens else None
            products = WeightProducts(deferring, x, grads_NF, gathered, sizes)
            deferring[0].deferred.append(products)
        bias_grads = _bias_gradients(grads_NF, sizes, ctx.learns_biases)
        x_grad_TD = x_grad_ND if group is None else wait(reducing)
        return x_grad_TD, None, None, None, None, *weight_grads, *bias_grads


def _input_gradient(grads_NF: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    x_grad_ND = grads_NF[0] @ weights[0]
    for grad_NF, weight in zip(grads_NF[1:], weights[1:], strict=True):
        x_grad_ND = x_grad_ND + grad_NF @ weight
    return x_grad_ND


def _bias_gradients(
    grads_NF: Sequence[Tensor], sizes: Sequence[int], learns: Sequence[bool]
) -> list[Tensor | None]:
    """Column sums; of a joined gradient in one pass, and then all of its layers learn a bias."""
    if not any(learns):
        return [None] * len(sizes)
    if len(grads_NF) < len(sizes):
        return list(torch.split(grads_NF[0].sum(0), list(sizes)))
    return [
        grad_NF.sum(0) if learns_bias else None
        for grad_NF, learns_bias in zip(grads_NF, learns, strict=True)
    ]
