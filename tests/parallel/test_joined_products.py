"""Gradients of layers that one product computes, against those of a product each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.parallel.deferred import WeightQueue
from megatron_bert.parallel.linear import (
    ColumnParallelLinear,
    column_parallel,
    joined_gradients,
)
from megatron_bert.parallel.sharding import local_part
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology

TOKENS, WIDTH = 6, 16


def _layers(tp: TensorParallelGroup, *, bias: bool = True) -> tuple[ColumnParallelLinear, ...]:
    """Queries, and keys and values that every rank has all of."""
    replicated = tp.size > 1
    layers = (
        ColumnParallelLinear(WIDTH, 24, tp, bias=bias),
        ColumnParallelLinear(WIDTH, 4, tp, bias=bias, replicated=replicated),
        ColumnParallelLinear(WIDTH, 4, tp, bias=bias, replicated=replicated),
    )
    random = torch.Generator().manual_seed(tp.rank)
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters()):
            part = local_part(parameter)
            part.copy_(torch.randn(part.shape, generator=random))
    return layers


def _taken(parameter: Tensor) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _check_joined(tensor: int, sequence: bool, defers: bool) -> None:
    tp = cpu_topology(tensor=tensor, sequence_parallel=sequence).tensor_parallel
    layers = _layers(tp)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(7)).requires_grad_()
    apart = torch.cat(column_parallel(x, layers, tp), 1)
    y_grad = torch.randn(apart.shape, generator=torch.Generator().manual_seed(8 + tp.rank))
    (x_grad,) = torch.autograd.grad(apart, x, y_grad, retain_graph=True)
    apart.backward(y_grad)
    expected = [_taken(layer.weight) for layer in layers]
    x.grad = None
    if defers:
        for layer in layers:
            layer.deferred = WeightQueue()
    weights = [local_part(layer.weight) for layer in layers]
    x_ours, weight_grads = joined_gradients(y_grad, x.detach(), weights, layers, tp, weights)
    torch.testing.assert_close(x_ours, x_grad)
    if layers[0].deferred is not None:
        assert all(gradient is None for gradient in weight_grads)
        (products,) = layers[0].deferred
        weight_grads = products.compute(products.gather())
    for ours, theirs in zip(weight_grads, expected, strict=True):
        # In this form a gradient is taken over as it is, not copied.
        assert ours is not None
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("defers", [False, True])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_gradients_of_one_product_are_those_of_each(
    tensor: int, sequence: bool, defers: bool
) -> None:
    run_ranks(tensor, _check_joined, tensor, sequence, defers)
