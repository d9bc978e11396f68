"""Sharded AdamW against PyTorch's own on the whole model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.distributed_harness import run_ranks
from tests.optim.shards import RATE, built, set_gradients, set_whole_gradients, whole


def _reference(model: nn.Module) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    wholes = {name: nn.Parameter(whole(p)) for name, p in model.named_parameters()}
    groups = [
        {"params": [p for p in wholes.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in wholes.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return wholes, torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-4)


def _check_against_pytorch(tensor: int, clip_grad: float) -> None:
    model, optimizer = built(tensor, clip_grad=clip_grad)
    wholes, reference = _reference(model)
    for scale in (1.0, 0.001):
        set_gradients(model, scale)
        set_whole_gradients(wholes.values(), scale)
        expected = torch.nn.utils.clip_grad_norm_(wholes.values(), clip_grad or math.inf)
        norm, skipped, _ = optimizer.step(RATE)
        reference.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert skipped.item() == 0.0
        assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter), wholes[name].detach(), msg=name)
    assert optimizer.updates == 2


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
def test_updates_and_norm_are_those_of_adamw_on_the_whole_model(
    world_size: int, tensor: int, clip_grad: float
) -> None:
    run_ranks(world_size, _check_against_pytorch, tensor, clip_grad)
