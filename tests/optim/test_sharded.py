"""What holds for every optimizer: skipped updates, and a state that can be taken up."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.distributed_harness import run_ranks
from tests.optim.shards import RATE, built, set_gradients, whole

NAMES = ("adamw", "muon")


def _check_skip(tensor: int, name: str, bad: float) -> None:
    model, optimizer = built(tensor, name=name)
    set_gradients(model, 1.0)
    optimizer.step(RATE)
    state = {**optimizer.state_tensors(), **dict(model.named_parameters())}
    before = {key: whole(value).clone() for key, value in state.items()}
    set_gradients(model, 1.0)
    if dist.get_rank() == dist.get_world_size() - 1:
        gradient = model.get_parameter("blocks.0.feed_forward.up.weight").grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        assert local is not None
        local.view(-1)[0] = bad
    norm, skipped, is_finite_here = optimizer.step(RATE)
    assert not norm.isfinite()
    assert bool(is_finite_here) == (dist.get_rank() < dist.get_world_size() - 1)
    assert skipped.item() == 1.0
    assert optimizer.updates == 1
    for key, value in state.items():
        assert torch.equal(whole(value), before[key]), key
    set_gradients(model, 1.0)
    assert optimizer.step(RATE)[1].item() == 0.0
    assert optimizer.updates == 2


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_number_on_one_rank_leaves_weights_and_moments_of_all_as_they_are(
    world_size: int, tensor: int, name: str, bad: float
) -> None:
    run_ranks(world_size, _check_skip, tensor, name, bad)


def _check_loss_skips(name: str, bad: float) -> None:
    model, optimizer = built(1, name=name)
    before = {key: whole(p) for key, p in model.named_parameters()}
    set_gradients(model, 1.0)
    norm, skipped, is_finite_here = optimizer.step(RATE, torch.tensor(bad))
    assert norm.isfinite()
    assert is_finite_here.item()
    assert skipped.item() == 1.0
    assert optimizer.updates == 0
    for key, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), before[key]), key
    set_gradients(model, 1.0)
    assert optimizer.step(RATE, torch.tensor(1.0)).skipped.item() == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_skips_the_update_though_the_gradient_is_finite(name: str, bad: float) -> None:
    run_ranks(2, _check_loss_skips, name, bad)


def _check_state_restores(name: str) -> None:
    model, optimizer = built(1, name=name)
    set_gradients(model, 1.0)
    optimizer.step(RATE)
    other_model, other = built(1, name=name)
    pairs = [
        (dict(model.named_parameters()), dict(other_model.named_parameters())),
        (optimizer.state_tensors(), other.state_tensors()),
    ]
    with torch.no_grad():
        for source, target in pairs:
            for key, tensor in target.items():
                tensor.copy_(source[key])
    other.updates = optimizer.updates
    for trained, its in ((model, optimizer), (other_model, other)):
        set_gradients(trained, 0.3)
        its.step(RATE)
    for key, parameter in other_model.named_parameters():
        assert torch.equal(whole(parameter), whole(model.get_parameter(key))), key


@pytest.mark.parametrize("name", NAMES)
def test_copying_into_the_state_tensors_restores_the_optimizer_to_the_bit(name: str) -> None:
    run_ranks(2, _check_state_restores, name)
