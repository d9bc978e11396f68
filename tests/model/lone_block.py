"""A block of 64 tokens by itself, as `kernels` has it computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_bert.model import kernels
from megatron_bert.model.attention import PackedLayout
from megatron_bert.model.block import Block, BlockDropout
from megatron_bert.parallel.random import element_draws
from tests.held_storages import Storages
from tests.small_model import cpu_topology, packed_inputs, small_config, whole_model

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


def lone_block(
    name: str, *, recompute: str = "none", fp8: bool = False, **model_keys: Any
) -> tuple[Block, BlockDropout]:
    """The second block of a small model, and its dropout."""
    config = small_config(model={**DROPOUT, **model_keys}, recompute=recompute, kernels=name)
    model = whole_model(config, cpu_topology()).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_check_device", lambda *_, **__: None)
        kernels.use_kernels(model, name, torch.device("cpu"), torch.float32, fp8=fp8)
    block = model.blocks["1"]
    assert isinstance(block, Block)
    draws, channels = torch.arange(64), element_draws(32, torch.device("cpu"))
    return block, BlockDropout(draws[:2], draws, draws, channels)


def two_rows() -> PackedLayout:
    """Of a block's 64 tokens."""
    return PackedLayout.from_positions(packed_inputs(2).positions)


def held_bytes(block: Block, dropout: BlockDropout) -> int:
    """Bytes that are there after a block's forward pass and were not before."""
    layout = two_rows()
    x = torch.randn(64, 32, requires_grad=True)
    there = [layout.begins_BS, layout.ends_BS, dropout.attention_T, dropout.channels_D, x]
    storages = Storages([*block.parameters(), *there])
    with storages:
        y = block(x, layout, dropout)
    held = storages.held()
    del y
    return held
