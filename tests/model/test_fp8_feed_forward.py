"""Fused blocks whose feed-forward network is in FP8, and the kernels that write its arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_bert.model import attention, kernels
from megatron_bert.parallel.random import element_draws, hash_dropout
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, packed_inputs, small_config, small_model

pytest.importorskip("triton", reason="needs Triton (tests/run.sh --peers installs it)")

from megatron_bert.model import fp8_arrays, fp8_feed_forward, fused_tiles
from megatron_bert.model.fp8 import E4M3, E5M2, largest_of
from megatron_bert.model.fused_norm import BranchMask, add_branch
from tests.model.fp8_casts import casts_of_a_gpu
from tests.model.lone_block import DROPOUT, held_bytes, lone_block, two_rows

pytestmark = pytest.mark.peers
on_the_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="blocks on the CPU need the interpreter"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TOKENS, HIDDEN, WIDE = 80, 48, 96


def _numbers(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(shape, generator=random).to(DEVICE)


def _means(numbers: Tensor, scale: Tensor, expected: Tensor) -> None:
    """FP8 numbers mean these, by half a step of their format."""
    step = {E4M3: 1 / 16, E5M2: 1 / 8}[numbers.dtype] * 1.001
    smallest = {E4M3: 2.0**-10, E5M2: 2.0**-17}[numbers.dtype]
    found = numbers.float() * scale
    allowed = step * expected.abs() + smallest * scale
    assert ((found - expected).abs() <= allowed).all()
    # No bound was passed.
    assert (expected.abs() <= largest_of(numbers.dtype) * scale * 1.0001).all()


@pytest.fixture(autouse=True)
def _casts() -> Iterator[None]:
    with nullcontext() if DEVICE.type == "cuda" else casts_of_a_gpu():
        yield


def _mask(dropout: float, has_bias: bool) -> BranchMask:
    channels = element_draws(HIDDEN, DEVICE)
    return BranchMask(dropout, torch.arange(TOKENS, device=DEVICE), channels, has_bias)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 300.0])
def test_a_norm_is_scaled_by_its_parameters_alone(has_bias: bool, factor: float) -> None:
    x, weight = _numbers(TOKENS, HIDDEN), _numbers(HIDDEN) * factor
    # A norm's largest number: all of a row is in one channel.
    x[3] = 0.0
    x[3, weight.abs().argmax()] = 1e4
    bias = _numbers(HIDDEN, 1)[:, 0] if has_bias else None
    scale = torch.empty(1, device=DEVICE)
    _, normed, mean, rstd = add_branch(x, None, None, None, (weight, bias, 1e-12), scale)
    assert normed.dtype == E4M3
    _means(normed, scale, F.layer_norm(x, (HIDDEN,), weight, bias, 1e-12))
    columns = fp8_arrays.norm_columns(x, mean, rstd, weight, bias, scale)
    assert torch.equal(columns.numbers.T.float(), normed.float())
    halved = torch.empty_like(scale)
    add_branch(x[:40] / 2, None, None, None, (weight, bias, 1e-12), halved)
    assert torch.equal(halved, scale)


def test_weights_are_laid_one_below_another() -> None:
    weights = [_numbers(WIDE, HIDDEN), 3 * _numbers(WIDE, HIDDEN)]
    scale = fp8_arrays.as_scale(weights[1].abs().max(), E4M3)
    rows = fp8_arrays.cast_weight(weights, scale, columns=False)
    _means(rows, scale, torch.cat(weights))
    columns = fp8_arrays.cast_weight(weights, scale, columns=True)
    assert torch.equal(columns.T.float(), rows.float())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_branch_s_gradient_is_dropped_summed_and_cast_at_once(
    dropout: float, has_bias: bool
) -> None:
    grad, mask = 1e-7 * _numbers(TOKENS, HIDDEN), _mask(dropout, has_bias)
    dropped = hash_dropout(grad, dropout, mask.token_draws_T, mask.channel_draws_D)
    scale = fp8_arrays.as_scale(grad.norm(dim=1).max() / (1 - dropout), E5M2)
    rows, columns, bias_grad = fp8_arrays.cast_gradient(grad, scale, mask, torch.float32)
    _means(rows.numbers, scale, dropped)
    assert torch.equal(columns.numbers.T.float(), rows.numbers.float())
    if has_bias:
        assert bias_grad is not None
        torch.testing.assert_close(bias_grad, dropped.sum(0))
    else:
        assert bias_grad is None


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
@pytest.mark.parametrize("has_biases", [True, False])
def test_the_activation_is_scaled_row_by_row_and_its_gradients_by_a_bound(
    activation: Any, has_biases: bool
) -> None:
    gate_up, grad = _numbers(TOKENS, 2 * WIDE), 1e-6 * _numbers(TOKENS, WIDE)
    gate_up[5] *= 20.0
    biases = (_numbers(WIDE), -2 * _numbers(WIDE)) if has_biases else None
    leaf = gate_up.clone().requires_grad_()
    both = leaf + torch.cat(biases) if biases else leaf
    expected = activation(both[:, :WIDE]) * both[:, WIDE:]
    expected.backward(grad)
    assert leaf.grad is not None

    rows, largest = fp8_arrays.activation_rows(gate_up, biases, activation)
    assert torch.equal(largest, both.detach().abs().amax(1))
    _means(rows.numbers, rows.scale, expected.detach())
    torch.testing.assert_close(rows.scale * 448, expected.detach().abs().amax(1, keepdim=True))

    grad_scale = fp8_arrays.as_scale(1.13 * grad.abs().max() * largest.max(), E5M2)
    active_scale = rows.scale.amax().view(1)
    grads, columns, active, bias_grads = fp8_arrays.gate_up_gradients(
        grad, gate_up, biases, activation, grad_scale, active_scale, torch.float32
    )
    _means(grads.numbers, grad_scale, leaf.grad)
    assert torch.equal(columns.numbers.T.float(), grads.numbers.float())
    _means(active.numbers.T, active_scale, expected.detach())
    if has_biases:
        assert bias_grads is not None
        torch.testing.assert_close(bias_grads.flatten(), leaf.grad.sum(0))
    else:
        assert bias_grads is None


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_program_that_takes_several_tiles_sums_and_writes_all_of_them(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiling = dataclasses.replace(fused_tiles.ROW_TILING, fp8_programs=1)
    monkeypatch.setattr(fused_tiles, "ROW_TILING", tiling)
    tokens = 4 * tiling.fp8.tokens - 16
    grad, channels = _numbers(tokens, HIDDEN), element_draws(HIDDEN, DEVICE)
    mask = BranchMask(0.3, torch.arange(tokens, device=DEVICE), channels, has_bias)
    dropped = hash_dropout(grad, 0.3, mask.token_draws_T, mask.channel_draws_D)
    scale = fp8_arrays.as_scale(dropped.abs().max(), E5M2)
    rows, columns, bias_grad = fp8_arrays.cast_gradient(grad, scale, mask, torch.float32)
    _means(rows.numbers, scale, dropped)
    assert torch.equal(columns.numbers.T.float(), rows.numbers.float())
    if has_bias:
        torch.testing.assert_close(bias_grad, dropped.sum(0))

    gate_up, active_grad = _numbers(tokens, 2 * WIDE), _numbers(tokens, WIDE)
    biases = (_numbers(WIDE), -2 * _numbers(WIDE)) if has_bias else None
    leaf = gate_up.clone().requires_grad_()
    both = leaf + torch.cat(biases) if biases else leaf
    expected = F.silu(both[:, :WIDE]) * both[:, WIDE:]
    expected.backward(active_grad)
    assert leaf.grad is not None
    scales = [
        fp8_arrays.as_scale(x.detach().abs().max(), made)
        for x, made in ((leaf.grad, E5M2), (expected, E4M3))
    ]
    grads, columns, active, bias_grads = fp8_arrays.gate_up_gradients(
        active_grad, gate_up, biases, F.silu, *scales, torch.float32
    )
    _means(grads.numbers, scales[0], leaf.grad)
    assert torch.equal(columns.numbers.T.float(), grads.numbers.float())
    _means(active.numbers.T, scales[1], expected.detach())
    if has_bias:
        torch.testing.assert_close(bias_grads.flatten(), leaf.grad.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "steepest"), [(F.silu, 2.4), (F.gelu, math.sqrt(2))])
def test_gate_s_and_up_s_gradients_fit_where_all_that_bounds_them_meets(
    activation: Any, steepest: float
) -> None:
    # One row of the output's gradient lies along the longest column of down, and there is gate
    # where the activation is steepest, beside the largest up.
    down = _numbers(HIDDEN, WIDE)
    down[:, 7] *= 5.0
    y_grad = 1e-3 * _numbers(TOKENS, HIDDEN)
    y_grad[3] = 40.0 * down[:, 7]
    gate_up = _numbers(TOKENS, 2 * WIDE)
    gate_up[3, 7], gate_up[3, WIDE + 7] = steepest, -50.0
    leaf = gate_up.clone().requires_grad_()
    (activation(leaf[:, :WIDE]) * leaf[:, WIDE:]).backward(y_grad @ down)
    assert leaf.grad is not None
    largest = gate_up.abs().amax(1)
    scale = fp8_feed_forward.gate_up_scale(y_grad.norm(dim=1), largest, down)
    reach = leaf.grad.abs().max() / (scale * largest_of(E5M2))
    # No more than what rounding may add is left.
    assert 0.8 < reach < 0.9


def test_rows_that_are_far_smaller_than_the_largest_keep_their_gradients() -> None:
    # Lengths and largest numbers of rows differ by powers of two, but not in the same rows.
    lengths = 2.0 ** torch.arange(0, -16, -1, device=DEVICE).repeat(5)
    largest = 2.0 ** torch.arange(-15, 1, device=DEVICE).repeat(5)
    down = _numbers(HIDDEN, WIDE)
    scale = fp8_feed_forward.gate_up_scale(lengths, largest, down)
    widest = down.norm(dim=0).max()
    assert scale * largest_of(E5M2) < 1.5 * widest * 2.0**-15


def _train(name: str, fp8: str, changes: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and all gradients of a step of two micro-batches."""
    model = {**DROPOUT, "init_std": 0.05, **changes.get("model", {})}
    options = {**changes, "model": model}
    config = small_config(kernels=name, precision={"compute": "fp32", "fp8": fp8}, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_check_device", lambda *_, **__: None)
        if name == "fused":
            patch.setattr(attention, "has_kernel", lambda *_: True)
        model = small_model(config, cpu_topology())
        batches = [packed_inputs(2), packed_inputs(2, first_row=2)]
        found = {"loss": model.runner.train(batches, torch.tensor(7.0))}
    model.sum_shared_gradients()
    for key, parameter in model.named_parameters().items():
        assert parameter.grad is not None
        grad = parameter.grad
        found[f"{key}.grad"] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def _check_near(changes: dict[str, Any]) -> None:
    with casts_of_a_gpu():
        exact, found = _train("torch", "none", changes), _train("fused", "current", changes)
    assert list(found) == list(exact)
    assert not torch.equal(found["loss"], exact["loss"])
    torch.testing.assert_close(found["loss"], exact["loss"], rtol=0.03, atol=0.0)
    for key, value in exact.items():
        if key.endswith("key.bias.grad"):
            # Softmax takes no notice of it: the gradient is rounding alone.
            continue
        similarity = F.cosine_similarity(found[key].flatten(), value.flatten(), dim=0)
        assert similarity > 0.95, f"{key}: {similarity}"
        assert 0.9 < found[key].norm() / value.norm() < 1.1, key


@on_the_cpu
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (1, {"model": {"architecture": "modernbert", "num_layers": 3}}),
        (1, {"recompute": "full"}),
        (2, {"parallel": {"reshard_after_forward": True}}),
        (2, {"model": {"hidden_dropout": 0.0}}),
    ],
)
def test_losses_and_gradients_are_near_those_without_fp8(
    ranks: int, changes: dict[str, Any]
) -> None:
    run_ranks(ranks, _check_near, changes)


def _held_bytes() -> int:
    with casts_of_a_gpu():
        return held_bytes(*lone_block("fused", fp8=True))


@on_the_cpu
def test_no_more_is_kept_than_without_fp8_but_a_number_a_token_and_four_scales() -> None:
    tokens, hidden, wide = 64, 32, 48
    plain = 4 * tokens * (4 * hidden + 2 * 8 + 2 * wide + 2 * 2 + 4)
    assert run_ranks(1, _held_bytes)[0] == plain + 4 * tokens + 4 * 4


def _not_finite(value: float) -> None:
    with casts_of_a_gpu():
        _check_not_finite(value)


def _check_not_finite(value: float) -> None:
    block, dropout = lone_block("fused", fp8=True)
    layout = two_rows()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = x.clone()
        hidden[3, 4] = value
        assert not block(hidden, layout, dropout).isfinite().all()
    y = block(x.requires_grad_(), layout, dropout)
    grad = torch.ones_like(y)
    grad[0, 0] = value
    y.backward(grad)
    for weight in (block.feed_forward.down.weight, block.feed_forward.gate.weight):
        assert weight.grad is not None
        assert not weight.grad.isfinite().all()


@on_the_cpu
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_seen(value: float) -> None:
    run_ranks(1, _not_finite, value)


def _of_nothing() -> None:
    with casts_of_a_gpu():
        _check_nothing()


def _check_nothing() -> None:
    block, dropout = lone_block("fused", fp8=True)
    layout = two_rows()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    y = block(torch.randn(64, 32, requires_grad=True), layout, dropout)
    y.backward(torch.zeros_like(y))
    for parameter in block.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0.0).all()


@on_the_cpu
def test_arrays_of_zeros_have_a_scale_too() -> None:
    run_ranks(1, _of_nothing)


def _down_gradient(fp8: bool) -> Tensor:
    """Of a gradient with one number a row, nine tenths of which are dropped."""
    block, dropout = lone_block("fused", fp8=fp8, hidden_dropout=0.9)
    layout = two_rows()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with casts_of_a_gpu():
        y = block(x, layout, dropout)
        y.backward(torch.eye(32).repeat(2, 1))
    gradient = block.feed_forward.down.weight.grad
    assert gradient is not None
    return gradient


def _check_dropout_s_scale() -> None:
    exact = _down_gradient(False)
    assert (_down_gradient(True) - exact).norm() < 0.1 * exact.norm()


@on_the_cpu
def test_what_dropout_makes_larger_still_fits() -> None:
    run_ranks(1, _check_dropout_s_scale)
