"""Layers of one input by one product, against a product each."""

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
    joined_column_parallel,
)
from megatron_bert.parallel.sharding import local_part
from tests.distributed_harness import run_ranks
from tests.held_storages import Storages
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


def _of_each(layers: tuple[ColumnParallelLinear, ...]) -> list[Tensor]:
    """This rank's gradients; of weights that were left, what was left."""
    queue = layers[0].deferred
    if queue is not None:
        (products,) = queue
        queue.clear()
        found = list(products.compute(products.gather()))
        assert all(layer.weight.grad is None for layer in layers)
    else:
        found = [_taken(layer.weight) for layer in layers]
    return found + [_taken(layer.bias) for layer in layers if layer.bias is not None]


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
    expected = _of_each(layers)
    x.grad = None
    if defers:
        for layer in layers:
            layer.deferred = WeightQueue()
    joined = joined_column_parallel(x, layers, tp)
    torch.testing.assert_close(joined, apart)
    joined.backward(y_grad)
    torch.testing.assert_close(x.grad, x_grad)
    for ours, theirs in zip(_of_each(layers), expected, strict=True):
        # In this form a gradient is taken over as it is, not copied.
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs)
    without = joined_column_parallel(x, layers, tp, with_biases=False)
    biases = torch.cat([local_part(layer.bias) for layer in layers if layer.bias is not None])
    torch.testing.assert_close(without + biases, apart)
    without.backward(y_grad)
    assert all(layer.bias is not None and layer.bias.grad is None for layer in layers)


@pytest.mark.parametrize("defers", [False, True])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_one_product_of_all_layers_is_one_of_each(
    tensor: int, sequence: bool, defers: bool
) -> None:
    run_ranks(tensor, _check_joined, tensor, sequence, defers)


def _held(tensor: int, bias: bool) -> tuple[int, int]:
    """Bytes that are kept for backward, and those of what is returned."""
    tp = cpu_topology(tensor=tensor).tensor_parallel
    layers = _layers(tp, bias=bias)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    there = [local_part(parameter) for layer in layers for parameter in layer.parameters()]
    storages = Storages([*there, x])
    with storages:
        y = joined_column_parallel(x, layers, tp)
    return storages.held(), y.untyped_storage().nbytes()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tensor", [1, 2])
def test_weights_laid_end_to_end_are_not_kept_for_backward(tensor: int, bias: bool) -> None:
    for held, returned in run_ranks(tensor, _held, tensor, bias):
        assert held == returned
