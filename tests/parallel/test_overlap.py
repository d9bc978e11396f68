"""What is under way beside what: the order in which operators are handed to the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bert.distributed.collectives import Pending, wait
from megatron_bert.parallel import linear, sharded_unit
from megatron_bert.parallel.linear import (
    ColumnParallelLinear,
    column_parallel,
    joined_gradients,
)
from megatron_bert.parallel.sharding import local_part
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, packed_inputs, small_config, small_model

_SHORT = {
    "aten::mm": "product",
    "aten::addmm": "product",
    "c10d::allreduce_": "sum",
    "c10d::_allgather_base_": "gather",
    "c10d::_reduce_scatter_base_": "scatter",
}


class _Order(TorchDispatchMode):
    """Notes products, collectives and waits as they are handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Any:
        for module in (linear, sharded_unit):
            self._patch.setattr(module, "wait", self._wait)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _wait(self, pending: Pending) -> Tensor:
        self.names.append("wait")
        return wait(pending)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in _SHORT:
            self.names.append(_SHORT[func.name()])
        return func(*args, **(kwargs or {}))


def _backward_order(sequence: bool, joined: bool) -> list[str]:
    tp = cpu_topology(tensor=2, sequence_parallel=sequence).tensor_parallel
    layers = (ColumnParallelLinear(8, 16, tp), ColumnParallelLinear(8, 16, tp))
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    x = torch.randn(6, 8, requires_grad=True)
    if joined:
        weights = [local_part(layer.weight).detach() for layer in layers]
        with _Order() as order:
            joined_gradients(torch.ones(12 if sequence else 6, 16), x, weights, layers, tp, weights)
        return order.names
    outputs = column_parallel(x, layers, tp)
    with _Order() as order:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return order.names


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("sequence", [False, True])
def test_collectives_of_a_column_parallel_layer_are_waited_for_behind_its_products(
    sequence: bool, joined: bool
) -> None:
    products = ["product"] * (1 if joined else 2)
    # The input's gradient, then its sum beside the weights' products.
    expected = [*products, "sum", *products, "wait"]
    if sequence:
        # Before that, the tokens are gathered beside the input's products.
        expected = ["gather", *products, "wait", "scatter", *products, "wait"]
    for order in run_ranks(2, _backward_order, sequence, joined):
        assert order == expected


def _gathered_before_products() -> list[int]:
    """Gatherings of weights that were begun before each block's first product."""
    config = small_config(model={"num_layers": 4}, parallel={"reshard_after_forward": True})
    model = small_model(config, cpu_topology())
    inputs = [packed_inputs(2)]
    model.runner.train(inputs, torch.ones(()))
    with _Order() as order:
        model.runner.train(inputs, torch.ones(()))
    counts, begun = [], 0
    for name, before in zip(order.names, ["", *order.names], strict=False):
        if name == "product" and before == "wait":
            counts.append(begun)
        begun += name == "gather"
    return counts[:4]


def test_a_blocks_weights_are_asked_for_before_the_block_ahead_of_it_computes() -> None:
    # What stands around the blocks, the first and the second; then one more each.
    for counts in run_ranks(2, _gathered_before_products):
        assert counts[0] >= 3
        assert counts == sorted(counts)
