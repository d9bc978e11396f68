"""Gradients that are added to their sums ahead of autograd, and weights that stand end to end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bert.parallel.gradient_sums import (
    added_to_sums,
    embedding_gradient,
    scaled_gradient,
    weight_gradients,
)
from megatron_bert.parallel.joined import joined_rows, joined_view
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, packed_inputs, small_config, small_model


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 500])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_rows_that_were_looked_up_are_added_to_a_table_s_sum_as_its_whole_gradient(
    dtype: torch.dtype, vocab: int, ids_dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)
    table, other = (nn.Parameter(torch.zeros(vocab, 8, dtype=dtype)) for _ in range(2))
    for one in (table, other):
        one.grad_dtype = torch.float32
        one.grad = torch.randn(vocab, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        # Of 40 tokens most occur more than once.
        ids = torch.randint(min(vocab, 25), (40,), generator=random).to(ids_dtype) * (
            vocab // 25 or 1
        )
        gradient = torch.randn(40, 8, generator=random).to(dtype)
        functional.embedding(ids, other).backward(gradient)
        with _Operators() as operators:
            assert embedding_gradient(gradient, ids, table) is None
        assert operators.counts["index_add_"] == (vocab > 40)
    assert table.grad is not None
    assert other.grad is not None
    assert torch.equal(table.grad, other.grad)


def test_a_table_without_a_sum_gets_its_gradient_from_autograd() -> None:
    table, ids, gradient = nn.Parameter(torch.zeros(50, 8)), torch.tensor([3, 3]), torch.ones(2, 8)
    given = embedding_gradient(gradient, ids, table)
    assert given is not None
    assert given[3].tolist() == [2.0] * 8
    assert given.sum() == 16


def test_a_scaled_gradient_is_added_where_there_is_a_sum_of_its_type() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    two = torch.tensor([2.0])
    assert scaled_gradient(parameter, torch.ones(3), two).tolist() == [2.0] * 3  # type: ignore[union-attr]
    parameter.grad = torch.ones(3)
    assert scaled_gradient(parameter, torch.ones(3), two) is None
    assert parameter.grad.tolist() == [3.0] * 3
    rounded = torch.ones(3, dtype=torch.bfloat16)
    assert scaled_gradient(parameter, rounded, two) is rounded


@pytest.mark.parametrize("has_sum", [True, False])
def test_a_scale_is_not_rounded_to_the_type_of_gradients(has_sum: bool) -> None:
    gradient = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected, scale = gradient.double() / 9, torch.tensor([1 / 9])
    parameter = nn.Parameter(torch.zeros_like(gradient))
    if has_sum:
        parameter.grad = torch.zeros_like(gradient)
    given = scaled_gradient(parameter, gradient.clone(), scale)
    assert given is not None
    # As a number of BF16, 1 / 9 is 0.2 % larger.
    assert abs((given.double() * expected).sum() / expected.square().sum() - 1) < 5e-4


class _Results(TorchDispatchMode):
    """Notes operators whose result is as large as the table."""

    def __init__(self, table: torch.Size) -> None:
        super().__init__()
        self._table = table
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self._table:
            self.names.append(func.name().split("::")[1])
        return result


def _operators_on_the_table() -> list[str]:
    sharded = small_model(small_config(), cpu_topology()).runner.model  # type: ignore[attr-defined]
    with sharded.step(1, keeps_sums=True):
        loss = sharded.module(*packed_inputs(2)).loss
        with _Results(sharded.module.embeddings.word.weight.shape) as results:
            loss.backward()
        table = sharded.module.embeddings.word.weight
        assert table.grad.any()
    return [name for name in results.names if "view" not in name and "detach" not in name]


def test_backward_the_table_s_sum_alone_is_written() -> None:
    # Once the head's gradient is added to all of it, once rows that were looked up are.
    assert run_ranks(1, _operators_on_the_table) == [["addcmul_", "index_add_"]]


def _check_weights_stand_end_to_end(ranks: int) -> None:
    model = small_model(small_config(), cpu_topology())
    sharded = model.runner.model  # type: ignore[attr-defined]
    with sharded.step():
        sharded.gather()
        for block in sharded.units:
            attention, network = block.attention, block.feed_forward
            wide = (attention.query, attention.key, attention.value)
            weights = [layer.weight for layer in wide]
            # 32 rows of 3 ranks are 33 in messages.
            assert (joined_view(weights) is None) == (ranks == 3)
            assert torch.equal(joined_rows(weights), torch.cat(weights))
            gate_up = joined_view([network.gate.weight, network.up.weight])
            assert gate_up is not None


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gathered_weights_of_layers_that_read_one_input_stand_end_to_end(ranks: int) -> None:
    run_ranks(ranks, _check_weights_stand_end_to_end, ranks)
