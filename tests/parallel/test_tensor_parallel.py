"""Tensor-parallel layers against the plain layers they stand for."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from megatron_bert.distributed import device_facts
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from megatron_bert.parallel.partial_gradients import sum_partial_gradients
from megatron_bert.parallel.sharding import make_parameter
from megatron_bert.parallel.vocabulary import VocabParallelEmbedding, vocab_parallel_cross_entropy
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology

TOKENS, WIDTH, VOCABULARY = 12, 16, 32


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _set(parameter: nn.Parameter, whole: Tensor) -> nn.Parameter:
    """Return the parameter in float64, holding its part of `whole`."""
    if isinstance(parameter, DTensor):
        (placement,) = parameter.placements
        mesh = parameter.device_mesh
        part = whole.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
        return nn.Parameter(DTensor.from_local(part, mesh, [placement], run_check=False))
    return nn.Parameter(whole.clone())


def _fill(layer: nn.Module, seed: int) -> dict[str, Tensor]:
    wholes = {}
    for index, (name, parameter) in enumerate(list(layer.named_parameters())):
        wholes[name] = _random(*parameter.shape, seed=seed + index)
        setattr(layer, name, _set(parameter, wholes[name]))
    return wholes


def _whole_grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    grad = parameter.grad
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def _check_feed_forward(tensor: int) -> None:
    tp = cpu_topology(tensor=tensor).tensor_parallel
    first = ColumnParallelLinear(WIDTH, 24, tp)
    shared = ColumnParallelLinear(WIDTH, 24 // tensor, tp, replicated=True)
    second = RowParallelLinear(24, WIDTH, tp)
    a, s, b = _fill(first, 1), _fill(shared, 5), _fill(second, 9)
    x = _random(6, WIDTH, seed=0).requires_grad_()
    split, same = column_parallel(x, (first, shared), tp)
    y = second(split.sin() * same)
    y.square().sum().backward()
    sum_partial_gradients([first, shared, second], tp)

    for whole in (*a.values(), *s.values(), *b.values()):
        whole.requires_grad_()
    x_ref = _random(6, WIDTH, seed=0).requires_grad_()
    # The shared layer's output meets every rank's slice of the split one.
    repeated = F.linear(x_ref, s["weight"], s["bias"]).repeat(1, tensor)
    hidden = F.linear(x_ref, a["weight"], a["bias"]).sin() * repeated
    y_ref = F.linear(hidden, b["weight"], b["bias"])
    y_ref.square().sum().backward()
    torch.testing.assert_close(y, y_ref)
    torch.testing.assert_close(x.grad, x_ref.grad)
    for layer, reference in ((first, a), (shared, s), (second, b)):
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(_whole_grad(parameter), reference[name].grad)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_column_then_row_parallel_is_two_linear_layers(tensor: int) -> None:
    run_ranks(tensor, _check_feed_forward, tensor)


def _head_tensors(tp: TensorParallelGroup) -> tuple[Tensor, nn.Parameter, nn.Parameter]:
    hidden = _random(TOKENS, WIDTH, seed=2).requires_grad_()
    table = _set(make_parameter((VOCABULARY, WIDTH), tp, 0), _random(VOCABULARY, WIDTH, seed=3))
    bias = _set(make_parameter((VOCABULARY,), tp, 0), _random(VOCABULARY, seed=4))
    return hidden, table, bias


def _check_cross_entropy(tensor: int, chunk: int, kernels: bool) -> None:
    from megatron_bert.parallel import softmax_rows, vocabulary

    vocabulary.logits_per_chunk = lambda _: chunk * VOCABULARY // tensor
    vocabulary.CPU_SOFTMAX_ELEMENTS = 2 * VOCABULARY // tensor
    softmax_rows.has_softmax_kernels = lambda _: kernels
    # Not all columns in one tile.
    softmax_rows._COLUMNS = 16
    tp = cpu_topology(tensor=tensor).tensor_parallel
    hidden, table, bias = _head_tensors(tp)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(6))
    labels[3] = (
        hidden[3] @ _random(VOCABULARY, WIDTH, seed=3).T + _random(VOCABULARY, seed=4)
    ).argmax()
    weights = torch.tensor([1.0, 0.0, 1.0] * (TOKENS // 3))
    weights[3] = 1.0
    local = [p.to_local() if isinstance(p, DTensor) else p for p in (table, bias)]
    loss, correct = vocab_parallel_cross_entropy(hidden, *local, labels.int(), weights, tp.group)
    (loss / 7).backward()

    hidden_ref, table_ref, bias_ref = (
        _random(*shape, seed=seed).requires_grad_()
        for shape, seed in (((TOKENS, WIDTH), 2), ((VOCABULARY, WIDTH), 3), ((VOCABULARY,), 4))
    )
    logits = F.linear(hidden_ref, table_ref, bias_ref)
    each = F.cross_entropy(logits, labels, reduction="none")
    loss_ref = (each * weights).sum()
    (loss_ref / 7).backward()
    correct_ref = (logits.argmax(1) == labels) * weights
    assert correct_ref.sum() >= 1
    close = {"rtol": 1e-5, "atol": 1e-6}  # logits are reduced in fp32
    torch.testing.assert_close(loss.double(), loss_ref, **close)
    assert correct.tolist() == correct_ref.tolist()
    torch.testing.assert_close(hidden.grad, hidden_ref.grad, **close)
    torch.testing.assert_close(_whole_grad(table), table_ref.grad, **close)
    torch.testing.assert_close(_whole_grad(bias), bias_ref.grad, **close)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("chunk", [5, 100])
def test_vocab_parallel_cross_entropy_is_cross_entropy(tensor: int, chunk: int) -> None:
    run_ranks(tensor, _check_cross_entropy, tensor, chunk, False)


@pytest.mark.peers
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("chunk", [5, 100])
def test_so_it_is_by_the_kernels(tensor: int, chunk: int) -> None:
    pytest.importorskip("triton", reason="needs Triton (tests/run.sh --peers installs it)")
    if torch.cuda.is_available():
        pytest.skip("on the CPU, which needs the interpreter")
    run_ranks(tensor, _check_cross_entropy, tensor, chunk, True)


@pytest.mark.parametrize(
    ("capability", "triton", "slices"),
    [((9, 0), True, 1), ((8, 0), True, 1), ((7, 5), True, 4), ((9, 0), False, 4)],
)
def test_where_softmax_has_no_kernels_it_is_taken_of_few_logits(
    capability: tuple[int, int], triton: bool, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_bert.parallel import vocabulary

    monkeypatch.setattr(device_facts, "find_spec", lambda _: object() if triton else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    # Here without a GPU: neither real nor fake tensors of one can be sliced.
    logits = MagicMock(spec=torch.Tensor, is_cuda=True, shape=(2**12, 2**16))
    logits.device = torch.device("cuda", 0)
    parts = [rows for rows, _ in vocabulary._softmax_slices(slice(5, 5 + 2**12), logits)]
    assert len(parts) == slices
    assert (parts[0].start, parts[-1].stop) == (5, 5 + 2**12)


def _check_embedding(tensor: int) -> None:
    tp = cpu_topology(tensor=tensor).tensor_parallel
    layer = VocabParallelEmbedding(VOCABULARY, WIDTH, tp)
    table = _fill(layer, 8)["weight"].requires_grad_()
    tokens = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    y, y_ref = layer(tokens.int().flatten()), F.embedding(tokens.flatten(), table)
    y.sin().sum().backward()
    y_ref.sin().sum().backward()
    torch.testing.assert_close(y, y_ref)
    torch.testing.assert_close(_whole_grad(layer.weight), table.grad)


@pytest.mark.parametrize("tensor", [1, 2])
def test_vocab_parallel_embedding_is_an_embedding(tensor: int) -> None:
    run_ranks(tensor, _check_embedding, tensor)


def test_the_loss_alone_leaves_no_gradient_tensors() -> None:
    run_ranks(1, _check_no_grad)


def _check_no_grad() -> None:
    tp = cpu_topology().tensor_parallel
    hidden, table, bias = _head_tensors(tp)
    with torch.no_grad():
        loss, _ = vocab_parallel_cross_entropy(
            hidden, table, bias, torch.zeros(TOKENS).int(), torch.ones(TOKENS), tp.group
        )
    assert not loss.requires_grad
