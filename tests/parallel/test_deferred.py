"""Zero bubble's deferred weights' gradients: the same to the bit, and at no further cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import RankModel
from megatron_bert.parallel.deferred import (
    DeferringLayer,
    WeightProducts,
    accumulate_deferred,
    dropping_deferred,
)
from megatron_bert.parallel.gradient_sums import weight_gradients
from megatron_bert.parallel.pipeline import Pipeline
from tests.distributed_harness import run_ranks
from tests.small_model import packed_inputs, small_config, small_model

MICRO_BATCHES = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"pipeline": 2, "tensor": 1},
    "tensor": {"pipeline": 2, "tensor": 2},
    "sequence": {"pipeline": 2, "tensor": 2, "sequence": True},
    "gathered again": {"pipeline": 2, "tensor": 1, "reshard_after_forward": True},
}


class _Operators(TorchDispatchMode):
    """Counts products of matrices and collectives of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::mm", "aten::addmm") or name.startswith(("_c10d_functional", "c10d")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _build(layout: dict[str, Any], schedule: str, compute: str) -> RankModel:
    config = small_config(
        model={"num_layers": 4},
        parallel={**layout, "pipeline_schedule": schedule},
        precision={"compute": compute},
    )
    return small_model(config, Topology.of(config.parallel, torch.device("cpu")))


def _step(
    layout: dict[str, Any], schedule: str, compute: str
) -> tuple[Tensor, dict[str, Tensor], Counter[str]]:
    model = _build(layout, schedule, compute)
    micro_batches = [packed_inputs(2, first_row=2 * n) for n in range(MICRO_BATCHES)]
    # The first step of a model makes more calls: some things are set up then.
    model.runner.train(micro_batches, torch.tensor(20.0))
    for parameter in model.named_parameters().values():
        parameter.grad = None
    with _Operators() as operators:
        loss = model.runner.train(micro_batches, torch.tensor(20.0))
    gradients = {}
    for name, parameter in model.named_parameters().items():
        assert isinstance(parameter.grad, DTensor), name
        gradients[name] = parameter.grad.to_local().clone()
    return loss, gradients, operators.counts


def _check_same(layout: dict[str, Any], compute: str) -> None:
    loss, gradients, operators = _step(layout, "interleaved", compute)
    deferred_loss, deferred, deferred_operators = _step(layout, "zero_bubble", compute)
    assert torch.equal(deferred_loss, loss)
    assert deferred.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(deferred[name], gradient), name
    assert deferred_operators == operators
    assert operators["aten::mm"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_zero_bubble_is_interleaved_to_the_bit_and_multiplies_and_sends_no_more(
    layout: str, compute: str
) -> None:
    run_ranks(4, _check_same, LAYOUTS[layout], compute)


def _check_deferral() -> None:
    model = _build({"pipeline": 2, "tensor": 1}, "zero_bubble", "fp32")
    assert isinstance(model.runner, Pipeline)
    sharded = model.runner.chunks[0]
    chunk = sharded.module
    block = next(iter(chunk.blocks.values()))
    layer: DeferringLayer = block.feed_forward.down
    hidden = torch.randn(64, 32, requires_grad=True)
    tokens, *others = packed_inputs(2)
    first = tokens if chunk.part.is_first else hidden
    for _ in range(2):
        chunk(first, *others).sum().backward()
    # The weights' gradients are not there, others are.
    assert layer.weight.grad is None
    assert block.feed_forward.down.bias.grad is not None
    assert layer.deferred is not None
    assert len(layer.deferred) == 2
    accumulate_deferred(sharded, reduces=False)
    assert layer.weight.grad is not None
    assert len(layer.deferred) == 1
    accumulate_deferred(sharded, reduces=False)
    assert not layer.deferred
    chunk(first, *others).sum().backward()
    with pytest.raises(RuntimeError), dropping_deferred(sharded):
        raise RuntimeError("of a step")
    assert not layer.deferred


def test_backward_leaves_the_products_and_they_are_computed_one_micro_batch_at_a_time() -> None:
    run_ranks(2, _check_deferral)


def test_products_of_several_layers_are_added_to_sums_that_stand_end_to_end() -> None:
    layers = [nn.Linear(8, rows, bias=False) for rows in (4, 2)]
    x, y_grad, sums = torch.randn(5, 8), torch.randn(5, 6), torch.ones(6, 8)
    left = WeightProducts(layers, x, [y_grad], joined=True)  # type: ignore[arg-type]
    first = left.compute(None)
    assert [gradient is None for gradient in first] == [False, False]
    for layer, part in zip(layers, sums.split([4, 2]), strict=True):
        layer.weight.grad = part
    assert left.compute(None) == [None, None]
    torch.testing.assert_close(sums, 1 + torch.cat(first))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("compute", "sums", "given"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
        # PyTorch has no product that rounds.
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_on_a_gpu_a_weights_gradient_is_not_rounded_before_its_sum(
    compute: torch.dtype, sums: torch.dtype, given: torch.dtype
) -> None:
    with FakeTensorMode():
        x, y_grad = (torch.empty(4, size, device="cuda", dtype=compute) for size in (8, 6))
        weight = nn.Parameter(torch.empty(6, 8, device="cuda", dtype=compute))
        weight.grad_dtype = sums
        (gradient,) = weight_gradients(y_grad, x, [weight])
    assert gradient is not None
    assert (gradient.dtype, gradient.shape) == (given, weight.shape)
