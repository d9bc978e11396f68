"""Gradients that are added to their sums ahead of autograd, and weights that stand end to end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bert.parallel.gradient_sums import added_to_sums, weight_gradients
from megatron_bert.parallel.joined import joined_rows, joined_view
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, small_config, small_model


class _Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def _weights(device: str, dtype: torch.dtype, sums: torch.dtype) -> list[nn.Parameter]:
    weights = [nn.Parameter(torch.empty(rows, 8, device=device, dtype=dtype)) for rows in (4, 2)]
    for weight in weights:
        weight.grad_dtype = sums
    return weights


def test_parts_that_stand_end_to_end_are_one_tensor_without_a_copy() -> None:
    memory = torch.arange(48.0)
    first, second = memory[:32].view(4, 8), memory[32:].view(2, 8)
    whole = joined_rows([first, second])
    assert torch.equal(whole, memory.view(6, 8))
    assert whole.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize(
    "parts",
    [
        (torch.ones(2, 8), torch.ones(2, 8)),
        (torch.ones(4, 8)[2:], torch.ones(4, 8)[:2]),
        tuple(torch.ones(4, 8)[::2].split(1)),
        tuple(torch.ones(4, 8).split(4, 1)),
    ],
    ids=["apart", "in another order", "with a gap", "side by side"],
)
def test_others_are_copied(parts: tuple[Tensor, ...]) -> None:
    assert joined_view(parts) is None
    assert torch.equal(joined_rows(parts), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sums", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("end_to_end", [True, False])
def test_gradients_are_added_as_autograd_adds_them(
    dtype: torch.dtype, sums: torch.dtype, end_to_end: bool
) -> None:
    torch.manual_seed(0)
    weights, others = _weights("cpu", dtype, sums), _weights("cpu", dtype, sums)
    memory = torch.zeros(6, 8, dtype=sums)
    for weight, part in zip(weights, memory.split([4, 2]), strict=True):
        weight.grad = part if end_to_end else part.clone()
    for _ in range(3):
        x, y_grad = torch.randn(5, 8, dtype=dtype), torch.randn(5, 6, dtype=dtype)
        torch.cat(others).backward(y_grad.T @ x)
        given = weight_gradients(y_grad, x, weights)
        assert [gradient is None for gradient in given] == [end_to_end] * 2
        assert added_to_sums(weights, given) == [None, None]
    for weight, other in zip(weights, others, strict=True):
        assert other.grad is not None
        assert weight.grad is not None
        assert torch.equal(weight.grad, other.grad)


def test_on_a_gpu_the_product_adds_to_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "addmm", lambda *_, **options: products.append(options))
    with FakeTensorMode(), _Operators() as operators:
        x, y_grad = (torch.empty(5, n, device="cuda", dtype=torch.bfloat16) for n in (8, 4))
        weight, _ = _weights("cuda", torch.bfloat16, torch.float32)
        weight.grad = torch.empty(4, 8, device="cuda")
        assert weight_gradients(y_grad, x, [weight]) == [None]
    assert products == [{"out_dtype": torch.float32, "out": weight.grad}]
    assert not {"mm", "mm.dtype", "add_.Tensor"} & set(operators.counts)


def test_small_gradients_are_added_at_once_and_those_without_a_sum_are_given() -> None:
    summed, new = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    summed.grad = torch.ones(3)
    with _Operators() as operators:
        given = added_to_sums(
            (summed, None, summed, new), (torch.ones(3), None, None, torch.ones(3))
        )
    assert [x is None for x in given] == [True, True, True, False]
    assert torch.equal(summed.grad, torch.full((3,), 2.0))
    assert operators.counts["_foreach_add_.List"] == 1


def _check_weights_stand_end_to_end() -> None:
    model = small_model(small_config(), cpu_topology())
    sharded = model.runner.model  # type: ignore[attr-defined]
    with sharded.step():
        sharded.gather()
        for block in sharded.units:
            attention, network = block.attention, block.feed_forward
            wide = (attention.query, attention.key, attention.value)
            assert joined_view([layer.weight for layer in wide]) is not None
            assert joined_view([network.gate.weight, network.up.weight]) is not None


@pytest.mark.parametrize("ranks", [1, 2])
def test_gathered_weights_of_layers_that_read_one_input_stand_end_to_end(ranks: int) -> None:
    run_ranks(ranks, _check_weights_stand_end_to_end)
