"""Products in FP8 by PyTorch, which a CPU computes too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.model.fp8 import fp8_linear
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, packed_inputs, small_config, small_model


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of x as FP8 of one scale has them, in float64."""
    scale = x.double().abs().max() / torch.finfo(dtype).max
    return (x.double() / scale).float().to(dtype).double() * scale


def _operands(tokens: int, width: int, features: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(5)
    shapes = ((tokens, width), (features, width), (features,), (tokens, features))
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_the_numbers_rounded_to_fp8(has_bias: bool) -> None:
    x, weight, bias, grad = _operands(48, 32, 64)
    leaves = [x, weight, bias] if has_bias else [x, weight]
    for leaf in leaves:
        leaf.requires_grad_()
    y = fp8_linear(x, weight, bias if has_bias else None)
    y.backward(grad)
    with torch.no_grad():
        x8, w8 = (_rounded(t, torch.float8_e4m3fn) for t in (x, weight))
        g8 = _rounded(grad, torch.float8_e5m2)
        expected = x8 @ w8.T + (bias.double() if has_bias else 0.0)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(y.double(), expected, **close)
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad.double(), g8 @ w8, **close)
    torch.testing.assert_close(weight.grad.double(), g8.T @ x8, **close)
    if has_bias:
        assert bias.grad is not None
        torch.testing.assert_close(bias.grad, grad.sum(0), **close)


def test_the_result_is_near_that_of_bf16() -> None:
    x, weight, bias, _ = (t.bfloat16() for t in _operands(64, 128, 256))
    exact = F.linear(x.double(), weight.double(), bias.double())
    found = fp8_linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    # Three bits after the point: each factor is off by 1/28 of its value at most.
    assert (found.double() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-38, 1e-20, 1e20, 3e37])
def test_any_size_of_numbers_is_scaled(factor: float) -> None:
    x, weight, _, _ = _operands(16, 32, 16)
    x = x / x.abs().max()
    found = fp8_linear(x * factor, weight, None)
    assert found.isfinite().all()
    if factor > 1e-30:
        torch.testing.assert_close(found / factor, fp8_linear(x, weight, None), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_seen(value: float) -> None:
    x, weight, _, grad = _operands(16, 32, 16)
    weight.requires_grad_()
    x[3, 4] = value
    assert not fp8_linear(x, weight, None).isfinite().all()
    grad[0, 0] = value
    fp8_linear(x.nan_to_num(0.0, 0.0), weight, None).backward(grad)
    assert weight.grad is not None
    assert not weight.grad.isfinite().all()


def test_operands_may_lie_in_any_order() -> None:
    x, weight, bias, grad = _operands(48, 32, 64)
    found = []
    for turned in (False, True):
        operands = [t.t().contiguous().t() if turned else t for t in (x, weight, grad)]
        leaves = [operand.detach().requires_grad_() for operand in operands[:2]]
        y = fp8_linear(*leaves, bias)
        found.append((y, *torch.autograd.grad(y, leaves, operands[2])))
    for plain, turned_around in zip(*found, strict=True):
        torch.testing.assert_close(turned_around, plain, rtol=1e-6, atol=1e-6)


def test_of_a_product_s_input_one_byte_a_number_is_kept() -> None:
    x, weight, bias, _ = _operands(64, 32, 48)
    weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x, weight, bias)
    assert sum(t.nbytes for t in kept if t is not weight) == x.numel() + 2 * 4


def _train(
    fp8: str,
    tensor: int = 1,
    sequence: bool = False,
    recompute: str = "none",
    compiled: bool = False,
) -> dict[str, Tensor]:
    """The loss and all gradients of a step of two micro-batches."""
    config = small_config(
        precision={"compute": "fp32", "fp8": fp8},
        # Of a usual size: steep attention would make much of a little noise.
        model={"hidden_dropout": 0.2, "attention_dropout": 0.2, "init_std": 0.05},
        recompute=recompute,
        compile={"enabled": compiled},
    )
    compile_block = nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        # As the project compiles, without a break; but no code is generated.
        patch.setattr(
            nn.Module,
            "compile",
            lambda block, **options: compile_block(block, backend="aot_eager", **options),
        )
        model = small_model(config, cpu_topology(tensor=tensor, sequence_parallel=sequence))
        batches = [packed_inputs(2), packed_inputs(2, first_row=2)]
        loss = model.runner.train(batches, torch.tensor(7.0))
    model.sum_shared_gradients()
    found = {"loss": loss}
    for name, parameter in model.named_parameters().items():
        assert parameter.grad is not None
        grad = parameter.grad
        found[f"{name}.grad"] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def _check_near(tensor: int, sequence: bool) -> None:
    exact, found = _train("none", tensor, sequence), _train("current", tensor, sequence)
    assert list(found) == list(exact)
    assert not torch.equal(found["loss"], exact["loss"])
    torch.testing.assert_close(found["loss"], exact["loss"], rtol=0.03, atol=0.0)
    for name, value in exact.items():
        if name.endswith("key.bias.grad"):
            # Softmax takes no notice of it: the gradient is rounding alone.
            continue
        similarity = F.cosine_similarity(found[name].flatten(), value.flatten(), dim=0)
        assert similarity > 0.95, f"{name}: {similarity}"


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_a_model_s_losses_and_gradients_are_near_those_without_fp8(
    tensor: int, sequence: bool
) -> None:
    run_ranks(tensor, _check_near, tensor, sequence)


def _check_same(recompute: str, compiled: bool) -> None:
    plain, found = _train("current"), _train("current", recompute=recompute, compiled=compiled)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("recompute", "compiled"), [("full", False), ("selective", False), ("none", True)]
)
def test_recomputation_and_compilation_change_nothing(recompute: str, compiled: bool) -> None:
    run_ranks(1, _check_same, recompute, compiled)
