"""Sharded AdamW against PyTorch's own on the whole model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_bert.model.bert import BertForPretraining
from megatron_bert.optim.adamw import ShardedAdamW
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, small_config, small_model

RATE = 0.05


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def _set_gradients(model: nn.Module, scale: float) -> None:
    """Give every parameter a gradient that depends on its name alone, whatever the layout."""
    for number, (_, parameter) in enumerate(model.named_parameters()):
        random = torch.Generator().manual_seed(number)
        gradient = scale * torch.randn(parameter.shape, generator=random)
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            gradient = DTensor.from_local(
                _part(gradient, parameter).reshape(local.shape),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        parameter.grad = gradient


def _part(whole: Tensor, parameter: DTensor) -> Tensor:
    """What this rank holds of `whole`: along `tp` first, then along `dp`."""
    names = parameter.device_mesh.mesh_dim_names or ()
    for name, placement in sorted(zip(names, parameter.placements, strict=True), reverse=True):
        axis = parameter.device_mesh[name]
        parts = whole.chunk(axis.size(), placement.dim)
        rank = axis.get_local_rank()
        whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole.contiguous()


def _built(tensor: int, **optimizer: Any) -> tuple[BertForPretraining, ShardedAdamW]:
    config = small_config(optimizer={"weight_decay": 0.1, **optimizer})
    topology = cpu_topology(tensor=tensor)
    model = small_model(config, topology)
    built = ShardedAdamW(model.named_parameters(), config.optimizer, model.counts_here)
    return model.chunks[0], built


def _reference(model: nn.Module) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    wholes = {name: nn.Parameter(_whole(p)) for name, p in model.named_parameters()}
    groups = [
        {"params": [p for p in wholes.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in wholes.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return wholes, torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-4)


def _check_against_pytorch(tensor: int, clip_grad: float) -> None:
    model, optimizer = _built(tensor, clip_grad=clip_grad)
    wholes, reference = _reference(model)
    for scale in (1.0, 0.001):
        _set_gradients(model, scale)
        for number, whole in enumerate(wholes.values()):
            random = torch.Generator().manual_seed(number)
            whole.grad = scale * torch.randn(whole.shape, generator=random)
        expected = torch.nn.utils.clip_grad_norm_(wholes.values(), clip_grad or math.inf)
        norm, skipped, _ = optimizer.step(RATE)
        reference.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert skipped.item() == 0.0
        assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(_whole(parameter), wholes[name].detach(), msg=name)
    assert optimizer.updates == 2


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
def test_updates_and_norm_are_those_of_adamw_on_the_whole_model(
    world_size: int, tensor: int, clip_grad: float
) -> None:
    run_ranks(world_size, _check_against_pytorch, tensor, clip_grad)


def _check_skip(tensor: int, bad: float) -> None:
    model, optimizer = _built(tensor)
    _set_gradients(model, 1.0)
    optimizer.step(RATE)
    state = {**optimizer.state_tensors(), **dict(model.named_parameters())}
    before = {name: _whole(value).clone() for name, value in state.items()}
    _set_gradients(model, 1.0)
    if dist.get_rank() == dist.get_world_size() - 1:
        gradient = next(p.grad for p in model.parameters() if p.dim() > 1)
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        assert local is not None
        local.view(-1)[0] = bad
    norm, skipped, is_finite_here = optimizer.step(RATE)
    assert not norm.isfinite()
    assert bool(is_finite_here) == (dist.get_rank() < dist.get_world_size() - 1)
    assert skipped.item() == 1.0
    assert optimizer.updates == 1
    for name, value in state.items():
        assert torch.equal(_whole(value), before[name]), name
    _set_gradients(model, 1.0)
    assert optimizer.step(RATE)[1].item() == 0.0
    assert optimizer.updates == 2


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_number_on_one_rank_leaves_weights_and_moments_of_all_as_they_are(
    world_size: int, tensor: int, bad: float
) -> None:
    run_ranks(world_size, _check_skip, tensor, bad)


def _check_loss_skips(bad: float) -> None:
    model, optimizer = _built(1)
    before = {name: _whole(p) for name, p in model.named_parameters()}
    _set_gradients(model, 1.0)
    norm, skipped, is_finite_here = optimizer.step(RATE, torch.tensor(bad))
    assert norm.isfinite()
    assert is_finite_here.item()
    assert skipped.item() == 1.0
    assert optimizer.updates == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(_whole(parameter), before[name]), name
    _set_gradients(model, 1.0)
    assert optimizer.step(RATE, torch.tensor(1.0)).skipped.item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_skips_the_update_though_the_gradient_is_finite(bad: float) -> None:
    run_ranks(2, _check_loss_skips, bad)


def _check_state_restores() -> None:
    model, optimizer = _built(1)
    _set_gradients(model, 1.0)
    optimizer.step(RATE)
    other_model, other = _built(1)
    pairs = [
        (dict(model.named_parameters()), dict(other_model.named_parameters())),
        (optimizer.state_tensors(), other.state_tensors()),
    ]
    with torch.no_grad():
        for source, target in pairs:
            for name, tensor in target.items():
                tensor.copy_(source[name])
    other.updates = optimizer.updates
    for trained, its in ((model, optimizer), (other_model, other)):
        _set_gradients(trained, 0.3)
        its.step(RATE)
    for name, parameter in other_model.named_parameters():
        assert torch.equal(_whole(parameter), _whole(dict(model.named_parameters())[name])), name


def test_copying_into_the_state_tensors_restores_the_optimizer_to_the_bit() -> None:
    run_ranks(2, _check_state_restores)
