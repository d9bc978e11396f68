"""The Triton kernels: on a GPU as they are, elsewhere by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_bert.model.attention import PackedLayout, written_out_attention
from megatron_bert.parallel.random import dropout_keys

pytest.importorskip("triton", reason="needs Triton (tests/run.sh --peers installs it)")

from megatron_bert.model import flash_tiles
from megatron_bert.model.flash_attention import PackedAttention, flash_attention
from megatron_bert.model.flash_tiles import AttentionTile, AttentionTiling
from megatron_bert.model.joined_attention import joined_attention

pytestmark = pytest.mark.peers

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter computes in fp32 as it is; a GPU's matrix units round.
DTYPE, TOLERANCE = (torch.bfloat16, 1e-2) if ON_GPU else (torch.float32, 1e-5)
TILINGS = {
    "small": AttentionTiling(
        AttentionTile(16, 16, 4, 1), AttentionTile(16, 16, 4, 1), AttentionTile(16, 16, 4, 1), 1
    ),
    "oblong": AttentionTiling(
        AttentionTile(32, 16, 4, 1), AttentionTile(16, 32, 4, 1), AttentionTile(16, 32, 4, 1), 40
    ),
    "default": AttentionTiling(),
}


def _positions(rows: int, slots: int, seed: int) -> Tensor:
    """Rows of segments of random lengths."""
    random = torch.Generator().manual_seed(seed)
    positions = torch.zeros(rows, slots, dtype=torch.int64)
    for row in positions:
        begin = 0
        while begin < slots:
            length = int(torch.randint(1, slots + slots // 2, (1,), generator=random))
            end = min(slots, begin + length)
            row[begin:end] = torch.arange(end - begin)
            begin = end
    return positions


@pytest.mark.parametrize(
    ("slots", "heads", "groups", "size", "reach", "dropout", "first_head", "tiling"),
    [
        (48, 4, 1, 16, None, 0.0, 0, "small"),
        (48, 4, 2, 16, None, 0.3, 0, "oblong"),
        (41, 6, 1, 16, None, 0.3, 2, "oblong"),
        (60, 4, 1, 32, 5, 0.1, 0, "small"),
        (200, 2, 1, 16, 40, 0.1, 0, "small"),
        (100, 2, 1, 64, None, 0.6, 0, "default"),
        (128, 2, 2, 128, None, 0.1, 1, "default"),
        (23, 6, 2, 16, 1, 0.3, 6, "small"),
    ],
)
def test_the_kernels_are_the_written_out_attention(
    slots: int,
    heads: int,
    groups: int,
    size: int,
    reach: int | None,
    dropout: float,
    first_head: int,
    tiling: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash_tiles, "ATTENTION_TILING", TILINGS[tiling])
    random = torch.Generator().manual_seed(slots)
    layout = PackedLayout.from_positions(_positions(2, slots, seed=heads).to(DEVICE), reach)
    keys = dropout_keys(torch.arange(2, device=DEVICE), 1, "x", range(1))[0]
    # Parts of one array do not stand densely.
    joined = torch.randn(2, slots, heads + 2 * groups, size, generator=random).to(DEVICE, DTYPE)
    q, k, v = (x.requires_grad_() for x in joined.split([heads, groups, groups], dim=2))
    y = flash_attention(q, k, v, layout.begins_BS, layout.ends_BS, reach, dropout, keys, first_head)
    y_grad = torch.randn(y.shape, generator=random).to(DEVICE, DTYPE)
    grads = torch.autograd.grad(y, (q, k, v), y_grad)

    heads_first = [x.detach().transpose(1, 2).float().requires_grad_() for x in (q, k, v)]
    bias = layout.with_bias(torch.float32).bias_B1SS
    assert bias is not None
    z = written_out_attention(*heads_first, bias, dropout, keys, first_head)
    expected = torch.autograd.grad(z, heads_first, y_grad.transpose(1, 2).float())
    for ours, theirs in zip((y, *grads), (z, *expected), strict=True):
        difference = (ours.float() - theirs.transpose(1, 2)).norm() / theirs.norm()
        assert difference < TOLERANCE

    qkv = joined.flatten(2).requires_grad_()
    sizes = [heads * size, groups * size, groups * size]
    biases = [torch.zeros(n, device=DEVICE, dtype=DTYPE, requires_grad=True) for n in sizes]
    arguments = (layout.begins_BS, layout.ends_BS, reach, dropout, keys, first_head)
    one = joined_attention(qkv, biases, groups, size, PackedAttention.of(*arguments))
    qkv_grad, *bias_grads = torch.autograd.grad(one, (qkv, *biases), y_grad)
    # The same kernels on the same numbers.
    assert torch.equal(one, y)
    assert torch.equal(qkv_grad, torch.cat(grads, dim=2).flatten(2))
    total = qkv_grad.float().sum((0, 1))
    bias_grad = torch.cat(bias_grads)
    assert (bias_grad.float() - total).norm() / total.norm() < TOLERANCE


def test_what_stands_in_other_segments_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a bit: what lies beyond a border is multiplied by 0."""
    random = torch.Generator().manual_seed(0)
    # Small tiles: some are whole, some have the border, some are not seen.
    monkeypatch.setattr(flash_tiles, "ATTENTION_TILING", TILINGS["small"])
    positions = torch.cat([torch.arange(40), torch.arange(60)])[None].to(DEVICE)
    layout = PackedLayout.from_positions(positions)
    arguments = (layout.begins_BS, layout.ends_BS)
    q, k, v = (torch.randn(1, 100, 2, 16, generator=random).to(DEVICE, DTYPE) for _ in range(3))
    before = flash_attention(q, k, v, *arguments)
    k[:, 40:], v[:, 40:] = 1e4, -1e4
    assert torch.equal(flash_attention(q, k, v, *arguments)[:, :40], before[:, :40])
