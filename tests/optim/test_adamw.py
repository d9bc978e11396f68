"""Sharded AdamW against PyTorch's own on the whole model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from megatron_bert.config.schema import OptimizerConfig
from megatron_bert.errors import ConfigError
from megatron_bert.optim.adamw import AdamW
from tests.distributed_harness import run_ranks
from tests.optim.shards import RATE, built, set_gradients, set_whole_gradients, whole
from tests.stand_ins import FusedAdam, install


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


def _check_apex(tensor: int, sizes: dict[str, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        install(patch, "apex.optimizers", FusedAdam=FusedAdam)
        model, optimizer = built(tensor, kernels="apex", sizes=sizes, clip_grad=0.5)
    other_model, other = built(tensor, sizes=sizes, clip_grad=0.5)
    for update, scale in enumerate((1.0, math.nan, 0.3, math.nan, math.nan, 0.01, 0.2)):
        for trained, its in ((model, optimizer), (other_model, other)):
            set_gradients(trained, scale)
            assert its.step(RATE / (1 + update)).skipped.item() == float(math.isnan(scale))
        assert optimizer.updates == other.updates
    for (name, mine), theirs in zip(
        model.named_parameters(), other_model.parameters(), strict=True
    ):
        torch.testing.assert_close(whole(mine), whole(theirs), msg=name)
    moments, others = optimizer.state_tensors(), other.state_tensors()
    assert list(moments) == list(others)
    for name, moment in moments.items():
        torch.testing.assert_close(whole(moment), whole(others[name]), msg=name)
    optimizer.updates = 9
    assert optimizer.updates == 9


@pytest.mark.parametrize("tensor", [1, 2])
def test_apex_s_updates_are_pytorch_s_skipped_ones_among_them(tensor: int) -> None:
    run_ranks(tensor, _check_apex, tensor, {})


def test_apex_s_updates_are_pytorch_s_where_ranks_hold_no_element_of_most_parameters() -> None:
    sizes = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 4, "ffn_hidden_size": 4}
    run_ranks(8, _check_apex, 1, sizes)


def _apex_without_shards() -> int:
    with pytest.MonkeyPatch.context() as patch:
        install(patch, "apex.optimizers", FusedAdam=FusedAdam)
        adamw = AdamW({}, OptimizerConfig(), torch.device("cpu"), "apex")
    for skipped in (0.0, 1.0, 0.0):
        adamw.step({}, RATE, torch.tensor(1.0), torch.tensor(skipped))
    return adamw.updates


def test_a_rank_without_parameters_counts_the_updates_as_others_do() -> None:
    assert _apex_without_shards() == 2


def _apex_without_extensions() -> str:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    with pytest.MonkeyPatch.context() as patch:
        install(patch, "apex.optimizers", FusedAdam=fail)
        with pytest.raises(ConfigError) as refused:
            built(1, kernels="apex")
    return str(refused.value)


def test_an_apex_without_its_extensions_is_refused_with_the_remedy() -> None:
    (message,) = run_ranks(1, _apex_without_extensions)
    assert message.startswith("kernels = apex: apex.optimizers.FusedAdam requires cuda extensions")
    assert "or use kernels=torch" in message
