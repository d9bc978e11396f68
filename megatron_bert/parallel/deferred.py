"""Deferred weight gradients, computed separately from the gradient of the input.

Zero bubble (Qi et al. 2024, section 2) lets the previous stage continue with the input's gradient,
and computes the weight gradients when the rank would otherwise wait. Layers with large products
defer them here in their backward pass, one `WeightProducts` each per micro-batch; small gradients
(biases, norms) are computed at once. `accumulate_deferred` computes what a micro-batch has
deferred. Every product is computed once, and every collective of a layer is called once, as in an
undivided backward pass.

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
    """Weight gradients y_grad^T x of one micro-batch that are not yet computed.

    Args:
        layers: the layers whose weights they are for.
        x_TD: the layers' input.
        grads_NF: gradients of the layers' outputs, one per layer; or, for one product of their
            weights, a single one with the layers' features side by side.
        group: the ranks whose tokens must be gathered; None if x has all of them.
        joined: whether one product gives them all, as in `weight_gradients`.
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
        """Start gathering the tokens; None if x already has all of them."""
        return None if self._group is None else start_all_gather(self._x_TD, self._group)

    def compute(self, gathering: Pending | None) -> Sequence[Tensor | None]:
        """Compute the gradients of this rank's weights, given what `gather` returned.

        A gradient that was added to its sum is returned as None.
        """
        x_ND = self._x_TD if gathering is None else wait(gathering)
        if self._joined:
            weights = [local_part(layer.weight) for layer in self.layers]
            return weight_gradients(self._grads_NF[0], x_ND, weights)
        return [grad_NF.T @ x_ND for grad_NF in self._grads_NF]


# A layer's deferred products, with the micro-batches in the order of their backward passes.
WeightQueue = deque[WeightProducts]


class DeferringLayer(Protocol):
    """A layer that defers its weight products if it has a queue for them.

    If several layers read one input, the first layer's queue takes the products of all of them.
    """

    weight: nn.Parameter
    deferred: WeightQueue | None


def defer_weight_gradients(model: ShardedModel[Any]) -> None:
    """Make the layers in the model's units defer their weight products from now on."""
    for unit in model.units:
        for layer in _deferring_layers(unit):
            layer.deferred = WeightQueue()


@contextmanager
def dropping_deferred(model: ShardedModel[Any]) -> Iterator[None]:
    """Wrap a step: discard what its layers have deferred if an exception ends it."""
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
    """`F.linear` whose backward pass puts the weight's product into the layer's queue."""
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
    """Compute what the longest-waiting micro-batch has deferred, and add it to the gradients.

    Args:
        model: the model whose layers deferred it.
        reduces: reduce each unit's gradients once they are complete, overlapping the next unit's
            products.
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
    """Compute the products in turn, gathering tokens for the next while one is computed."""
    gathering = products[0].gather() if products else None
    while products:
        # Taken off the queue, so that its memory is freed once it is used up.
        group = products.popleft()
        ready, gathering = gathering, products[0].gather() if products else None
        weights = [layer.weight for layer in group.layers]
        first = added_to_sums(weights, group.compute(ready))
        for weight, gradient in zip(weights, first, strict=True):
            # As autograd does with a gradient that has no sum yet.
            if gradient is not None:
                weight.grad = gradient.to(gradient_dtype(weight))
