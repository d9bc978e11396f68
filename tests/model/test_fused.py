"""The fused kernels: on a GPU as they are, elsewhere by Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_bert.parallel.random import dropout_keys, element_draws, hash_dropout, vector_draws

pytest.importorskip("triton", reason="needs Triton (tests/run.sh --peers installs it)")

from megatron_bert.benchmark.kernels.fused_functions import added, gated_down, residual_norm
from megatron_bert.model import fused_tiles
from megatron_bert.model.fused_activation import Activation
from megatron_bert.model.fused_norm import BranchMask, add_branch, norm_again
from megatron_bert.model.fused_reference import plain_gated_down, plain_residual_norm
from megatron_bert.model.fused_tiles import RowTile, RowTiling
from megatron_bert.parallel.column_sums import column_sums

pytestmark = pytest.mark.peers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-5
# Programs that take several tiles, and not all as many.
FEW_PROGRAMS = RowTiling(row_programs=3, activation_programs=6)


class _Inputs:
    """Random tensors that get gradients, and their fp32 copies that the reference reads."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(seed)
        self.ours: list[Tensor] = []
        self.theirs: list[Tensor] = []

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(DEVICE, self.dtype)

    def make(self, *shape: int) -> tuple[Tensor, Tensor]:
        ours = self.numbers(*shape)
        pair = ours.requires_grad_(), ours.detach().float().requires_grad_()
        self.ours.append(pair[0])
        self.theirs.append(pair[1])
        return pair

    def check_gradients(
        self, outputs: list[Tensor], grads: list[Tensor], expected: list[Tensor]
    ) -> None:
        """`grads` are of our outputs, and of the reference's."""
        found = torch.autograd.grad(outputs, self.ours, grads)
        wanted = torch.autograd.grad(expected, self.theirs, [grad.float() for grad in grads])
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == self.dtype
            self.check(ours, theirs)

    def check(self, ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == theirs.shape
        difference = (ours.float() - theirs).norm() / theirs.norm().clamp(min=1e-6)
        assert difference < TOLERANCES[self.dtype]


@dataclass(frozen=True)
class _Branch:
    """What a sub-layer adds."""

    y: Tensor
    bias: Tensor | None
    mask: BranchMask


def _plain(
    x: Tensor, branch: _Branch, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    mask = branch.mask
    draws = (mask.token_draws_T, mask.channel_draws_D)
    return plain_residual_norm(x, branch.y, branch.bias, weight, bias, mask.dropout, draws, EPS)


def _branch(inputs: _Inputs, tokens: int, size: int, bias: bool, dropout: float) -> list[_Branch]:
    """A sub-layer's output, ours and the reference's."""
    keys = dropout_keys(torch.arange(1, device=DEVICE), 1, "x", range(1))[0]
    draws = (
        vector_draws(keys, torch.arange(tokens, device=DEVICE)),
        element_draws(size, DEVICE),
    )
    ys = inputs.make(tokens, size)
    biases = inputs.make(size) if bias else (None, None)
    mask = BranchMask(dropout, *draws, bias)
    return [_Branch(y, b, mask) for y, b in zip(ys, biases, strict=True)]


def _with_norm(
    x: Tensor, branch: _Branch, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return residual_norm(x, branch.y, branch.bias, branch.mask, weight, bias, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "size", "biases", "dropout"),
    [
        (37, 96, True, 0.3),
        (37, 96, False, 0.0),
        (9, 1536, True, 0.1),
        (5, 1536, True, 0.0),
        (1, 16, False, 0.5),
        (66, 40, True, 0.1),
    ],
)
def test_residual_and_norm_are_the_plain_ones(
    tokens: int,
    size: int,
    biases: bool,
    dropout: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_tiles, "ROW_TILING", FEW_PROGRAMS)
    inputs = _Inputs(dtype, seed=tokens)
    x, plain_x = inputs.make(tokens, size)
    branch, plain_branch = _branch(inputs, tokens, size, biases, dropout)
    weight, plain_weight = inputs.make(size)
    bias, plain_bias = inputs.make(size) if biases else (None, None)
    total, normed = _with_norm(x, branch, weight, bias)
    expected = _plain(plain_x, plain_branch, plain_weight, plain_bias)
    inputs.check(total, expected[0])
    inputs.check(normed, expected[1])
    with torch.no_grad():
        norm = (weight, bias, EPS)
        made = add_branch(x, branch.mask, branch.y, branch.bias, norm)
        inputs.check(norm_again(made[0], *made[2:], weight, bias), expected[1])
    grads = [inputs.numbers(tokens, size) for _ in range(2)]
    inputs.check_gradients([total, normed], grads, list(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "has_bias"), [(96, True), (48, False)])
def test_a_norm_alone_gives_back_the_residual_stream_with_both_gradients_in_one(
    size: int, has_bias: bool, dtype: torch.dtype
) -> None:
    inputs = _Inputs(dtype, seed=size)
    x, plain_x = inputs.make(21, size)
    weight, plain_weight = inputs.make(size)
    bias, plain_bias = inputs.make(size) if has_bias else (None, None)
    same, normed = residual_norm(x, None, None, None, weight, bias, EPS)
    assert torch.equal(same, x)
    assert same.data_ptr() == x.data_ptr()
    assert same.grad_fn is normed.grad_fn
    expected = F.layer_norm(plain_x, (size,), plain_weight, plain_bias, EPS)
    inputs.check(normed, expected)
    grads = [inputs.numbers(21, size) for _ in range(2)]
    inputs.check_gradients([same, normed], grads, [plain_x * 1.0, expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "size", "bias", "dropout"),
    [(37, 96, True, 0.3), (37, 96, True, 0.0), (9, 1536, False, 0.1), (4, 16, False, 0.0)],
)
def test_a_branch_is_added_without_a_norm(
    tokens: int,
    size: int,
    bias: bool,
    dropout: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_tiles, "ROW_TILING", FEW_PROGRAMS)
    inputs = _Inputs(dtype, seed=tokens)
    x, plain_x = inputs.make(tokens, size)
    branch, plain_branch = _branch(inputs, tokens, size, bias, dropout)
    total = added(x, branch.y, branch.bias, branch.mask)
    weight = torch.ones(size, device=DEVICE)
    expected = _plain(plain_x, plain_branch, weight, None)[0]
    inputs.check(total, expected)
    grads = [inputs.numbers(tokens, size)]
    inputs.check_gradients([total], grads, [expected])


def test_the_same_elements_are_dropped_as_without_kernels_and_again_backward() -> None:
    inputs = _Inputs(torch.float32, seed=0)
    branch = _branch(inputs, 50, 96, False, 0.3)[0]
    ones = torch.ones(50, 96, device=DEVICE, requires_grad=True)
    branch, zeros = replace(branch, y=ones), torch.zeros(50, 96, device=DEVICE)
    expected = hash_dropout(ones, 0.3, branch.mask.token_draws_T, branch.mask.channel_draws_D)
    total = added(zeros, branch.y, branch.bias, branch.mask)
    assert torch.equal(total, expected)
    # The norm's part of the gradient is 0, as the sum alone is read.
    weight = torch.ones(96, device=DEVICE, requires_grad=True)
    with_norm, normed = _with_norm(zeros, branch, weight, None)
    assert torch.equal(with_norm, expected)
    for output in (total.sum(), with_norm.sum() + 0.0 * normed.sum()):
        assert torch.equal(torch.autograd.grad(output, ones)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "size", "biases", "activation"),
    [(37, 48, True, F.silu), (37, 600, True, F.gelu), (33, 300, False, F.gelu)],
)
def test_the_gated_activation_and_its_product_are_the_plain_ones(
    tokens: int,
    size: int,
    biases: bool,
    activation: Activation,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_tiles, "ROW_TILING", FEW_PROGRAMS)
    inputs, width = _Inputs(dtype, seed=tokens), 24
    gate_up, plain_gate_up = inputs.make(tokens, 2 * size)
    none = (None, None)
    (gate_bias, plain_gate_bias), (up_bias, plain_up_bias) = (
        inputs.make(size) if biases else none for _ in range(2)
    )
    weight, plain_weight = inputs.make(width, size)
    y = gated_down(gate_up, gate_bias, up_bias, weight, activation)
    plain = (plain_gate_up, plain_gate_bias, plain_up_bias, plain_weight)
    expected = plain_gated_down(*plain, activation)
    inputs.check(y, expected)
    inputs.check_gradients([y], [inputs.numbers(tokens, width)], [expected])


def test_the_same_input_gives_the_same_bits() -> None:
    def gradients() -> list[Tensor]:
        inputs = _Inputs(torch.bfloat16, seed=3)
        x = inputs.make(700, 64)[0]
        branch = _branch(inputs, 700, 64, True, 0.1)[0]
        weight, bias = inputs.make(64)[0], inputs.make(64)[0]
        total, normed = _with_norm(x, branch, weight, bias)
        grads = [inputs.numbers(700, 64) for _ in range(2)]
        return list(torch.autograd.grad([total, normed], inputs.ours, grads))

    for once, again in zip(gradients(), gradients(), strict=True):
        assert torch.equal(once, again)


def test_tiles_hold_as_much_whatever_the_width() -> None:
    tiling = RowTiling()
    assert tiling.rows(1536) == RowTile(4, 2048, 8)
    assert tiling.gradient_rows(1536) == RowTile(2, 2048, 8)
    assert tiling.gradient_rows(768) == RowTile(4, 1024, 8)
    assert tiling.rows(96) == RowTile(16, 128, 4)
    assert tiling.rows(16) == RowTile(16, 16, 1)
    assert tiling.gradient_rows(5120) == RowTile(1, 8192, 16)


@pytest.mark.parametrize(
    ("given", "asked"), [(torch.bfloat16, torch.float32), (torch.float32,) * 2]
)
@pytest.mark.parametrize("shape", [(1, 7), (130, 33), (64, 32)])
def test_column_sums_are_added_up_in_fp32(
    shape: tuple[int, int], given: torch.dtype, asked: torch.dtype
) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, given)
    sums = column_sums(rows, asked)
    assert sums.dtype == asked
    torch.testing.assert_close(sums.double(), rows.double().sum(0), rtol=1e-5, atol=1e-5)
