from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from megatron_bert.model.attention import PackedLayout, attend
from megatron_bert.parallel.random import dropout_keys

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7]])


def _qkv(heads: int = 4, groups: int = 2) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, 8, 16, generator=random) for h in (heads, groups, groups))


def _layout(positions: torch.Tensor, reach: int | None = None) -> PackedLayout:
    return PackedLayout.from_positions(positions, reach).with_bias(torch.float32)


def _visible(layout: PackedLayout) -> torch.Tensor:
    assert layout.bias_B1SS is not None
    return layout.bias_B1SS[:, 0] == 0


def test_layout_tells_where_each_slots_segment_begins_and_ends() -> None:
    layout = PackedLayout.from_positions(POSITIONS)
    assert layout.begins_BS.tolist() == [[0, 0, 0, 0, 4, 4, 4, 7], [0] * 8]
    assert layout.ends_BS.tolist() == [[4, 4, 4, 4, 7, 7, 7, 8], [8] * 8]


def test_layout_shows_each_slot_its_own_segment_only() -> None:
    visible = _visible(_layout(POSITIONS))
    assert visible[1].all()
    expected = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3), torch.ones(1, 1)).bool()
    assert torch.equal(visible[0], expected)


def test_a_window_shows_each_slot_its_neighbours_of_the_same_segment() -> None:
    visible = _visible(_layout(POSITIONS, reach=2))
    near = (torch.arange(8)[:, None] - torch.arange(8)).abs() <= 2
    assert torch.equal(visible[1], near)
    segments = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3), torch.ones(1, 1)).bool()
    assert torch.equal(visible[0], near & segments)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_over_a_packed_row_is_attention_over_each_segment(groups: int) -> None:
    q, k, v = _qkv(groups=groups)
    packed = attend(q, k, v, _layout(POSITIONS))
    for begin, end in ((0, 4), (4, 7), (7, 8)):
        part = [x[:1, :, begin:end] for x in (q, k, v)]
        layout = _layout(torch.arange(end - begin)[None])
        alone = attend(*part, layout)
        torch.testing.assert_close(packed[:1, :, begin:end], alone)


def test_attention_is_scaled_softmax() -> None:
    q, k, v = _qkv(groups=4)
    weights = (q @ k.mT / math.sqrt(16)).softmax(-1)
    layout = _layout(torch.arange(8).repeat(2, 1))
    torch.testing.assert_close(attend(q, k, v, layout), weights @ v)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_written_out_attention_is_pytorchs_own(groups: int) -> None:
    qkv = _qkv(groups=groups)
    layout = _layout(POSITIONS)
    ours, theirs = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
    y = attend(*ours, layout)
    z = F.scaled_dot_product_attention(*theirs, attn_mask=layout.bias_B1SS, enable_gqa=groups != 4)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_dropout_of_attention_weights_keeps_the_expected_value() -> None:
    q, k, v = _qkv()
    layout = _layout(POSITIONS)
    keys = dropout_keys(torch.arange(2), 0, "attention", range(4000))
    mean = torch.stack([attend(q, k, v, layout, 0.2, key) for key in keys]).mean(0)
    assert (mean - attend(q, k, v, layout)).abs().max() < 0.08
    dropped = attend(q, k, v, layout, 0.2, keys[0])
    assert not torch.equal(dropped, attend(q, k, v, layout, 0.2, keys[1]))


def test_a_part_of_the_heads_drops_what_it_would_drop_among_all() -> None:
    q, k, v = _qkv(groups=4)
    layout = _layout(POSITIONS)
    keys = dropout_keys(torch.arange(2), 0, "attention", range(1))[0]
    whole = attend(q, k, v, layout, 0.5, keys)
    part = attend(q[:, 2:], k[:, 2:], v[:, 2:], layout, 0.5, keys, first_head=2)
    torch.testing.assert_close(part, whole[:, 2:])
