"""Weights' gradients that are computed apart from the gradient of the input.

Zero bubble (Qi et al. 2024, section 2) lets the stage before go on with the input's gradient and
computes the weights' while it would wait. Layers that have large products leave them here in their
backward pass, one `WeightProducts` each a micro-batch; small gradients (biases, norms) are had at
once. `accumulate_deferred` computes what a micro-batch left, so that every product is computed and
every collective of a layer is called once, as in one pass.

Shape suffixes: T tokens that a rank holds, N tokens of the micro-batch (T, or T x ranks), D
features in, F features out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.distributed.collectives import Pending, start_all_gather, wait
from megatron_bert.parallel.data_parallel import ShardedModel
from megatron_bert.parallel.gradient_sums import (
    added_to_sums,
    gradient_dtype,
    weight_gradients,
)
from megatron_bert.parallel.sharding import local_part


class WeightProducts:
    """Gradients y_grad^T x of the weights that one micro-batch's x went through, not yet computed.

    Args:
        layers: whose weights they are.
        x_TD: what they read.
        grads_NF: of what they gave, one a layer; or, for one product of their weights, one with the
            layers' features side by side.
        group: the ranks whose tokens are to be gathered; None where x has all of them.
        joined: whether they come by one product, as `weight_gradients` gives them.
    """

    def __init__(
        self,
        layers: Sequence[DeferringLayer],
        x_TD: Tensor,
        grads_NF: Sequence[Tensor],
        group: dist.ProcessGroup | None = None,
        *,
        joined: bool = False,
    ) -> None:
        self.layers = layers
        self._x_TD = x_TD
        self._grads_NF = grads_NF
        self._group = group
        self._joined = joined

    def gather(self) -> Pending | None:
        """Begin to gather the tokens; None where they are all there."""
        return None if self._group is None else start_all_gather(self._x_TD, self._group)

    def compute(self, gathering: Pending | None) -> Sequence[Tensor | None]:
        """The gradients of this rank's weights, from what `gather` returned.

        Those that were added to their sums are None.
        """
        x_ND = self._x_TD if gathering is None else wait(gathering)
        if self._joined:
            weights = [local_part(layer.weight) for layer in self.layers]
            return weight_gradients(self._grads_NF[0], x_ND, weights)
        return [grad_NF.T @ x_ND for grad_NF in self._grads_NF]


# What a layer has left, the micro-batches in the order of their backward passes.
WeightQueue = deque[WeightProducts]


class DeferringLayer(Protocol):
    """A layer that leaves its products, in a queue where it has one.

    Of several layers that read one input the first's queue takes the products of all.
    """

    weight: nn.Parameter
    deferred: WeightQueue | None


def defer_weight_gradients(model: ShardedModel[Any]) -> None:
    """Have the layers in the model's units leave their products from now on."""
    for unit in model.units:
        for layer in _deferring_layers(unit):
            layer.deferred = WeightQueue()


@contextmanager
def dropping_deferred(model: ShardedModel[Any]) -> Iterator[None]:
    """Around a step: what its layers have left goes with an exception."""
    try:
        yield
    except BaseException:
        for unit in model.units:
            for layer in _deferring_layers(unit):
                if layer.deferred is not None:
                    layer.deferred.clear()
        raise


def _deferring_layers(unit: nn.Module) -> Iterator[DeferringLayer]:
    for module in unit.modules():
        if hasattr(module, "deferred"):
            yield cast(DeferringLayer, module)


def linear_with_deferred_weight(
    layer: DeferringLayer, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None
) -> Tensor:
    """`F.linear` whose backward pass leaves the weight's product in the layer's queue."""
    y: Tensor = _Linear.apply(x_ND, weight_FD.detach(), bias_F, layer)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor | None,
        layer: DeferringLayer,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, weight_FD)
        ctx.layer, ctx.has_bias = layer, bias_F is not None
        return F.linear(x_ND, weight_FD, bias_F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NF,) = grads
        x_ND, weight_FD = ctx.saved_tensors
        ctx.layer.deferred.append(WeightProducts([ctx.layer], x_ND, [grad_NF]))
        return grad_NF @ weight_FD, None, grad_NF.sum(0) if ctx.has_bias else None, None


def accumulate_deferred(model: ShardedModel[Any], *, reduces: bool) -> None:
    """Compute what the longest waiting micro-batch has left, and add it to the gradients.

    Args:
        model: what left it.
        reduces: reduce each unit's gradients, once they are there, beside the next one's products.
    """
    for unit in reversed(model.units):
        products = deque(
            layer.deferred.popleft() for layer in _deferring_layers(unit) if layer.deferred
        )
        _accumulate(products)
        if reduces:
            model.reduce(unit)


@torch.no_grad()
def _accumulate(products: deque[WeightProducts]) -> None:
    """Gather the tokens of one while another's products are computed."""
    gathering = products[0].gather() if products else None
    while products:
        # What was left goes as soon as it is used up.
        group = products.popleft()
        ready, gathering = gathering, products[0].gather() if products else None
        weights = [layer.weight for layer in group.layers]
        first = added_to_sums(weights, group.compute(ready))
        for weight, gradient in zip(weights, first, strict=True):
            # As autograd does with a gradient that has no sum yet.
            if gradient is not None:
                weight.grad = gradient.to(gradient_dtype(weight))
