"""Muon on shards against PyTorch's own on whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_bert.optim.muon import orthogonalized
from tests.distributed_harness import run_ranks
from tests.optim.shards import RATE, built, set_gradients, set_whole_gradients, whole


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)], ids=str)
def test_orthogonalizing_keeps_singular_vectors_and_brings_values_near_one(
    shape: tuple[int, int],
) -> None:
    random = torch.Generator().manual_seed(5)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=random))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=random))
    values = torch.logspace(0, -2, min(shape))
    result = orthogonalized((3.0 * (left * values) @ right.T)[None])[0]
    core = left.T @ result @ right
    assert ((core.diag() > 0.65) & (core.diag() < 1.25)).all()
    torch.testing.assert_close(core.diag().diag(), core, rtol=0, atol=1e-4)
    torch.testing.assert_close(left @ core @ right.T, result, rtol=0, atol=1e-4)


def test_a_matrix_of_zeros_stays_so() -> None:
    assert not orthogonalized(torch.zeros(2, 4, 6)).any()


def _references(
    wholes: dict[str, nn.Parameter],
) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """PyTorch's optimizers of the blocks' matrices and of the rest."""
    matrices = [p for n, p in wholes.items() if n.startswith("blocks.") and p.dim() == 2]
    others = [p for p in wholes.values() if all(p is not matrix for matrix in matrices)]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(
        matrices, lr=RATE, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    return muon, torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-4)


def _check_against_pytorch(tensor: int, precision: str) -> None:
    clip_grad = 0.5
    model, optimizer = built(tensor, precision, name="muon", momentum=0.9, clip_grad=clip_grad)
    wholes = {name: nn.Parameter(whole(p)) for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in wholes.items()}
    references = _references(wholes)
    with pytest.MonkeyPatch.context() as patch:
        if precision == "fp32":
            # Theirs always multiplies in bf16.
            patch.setattr(Tensor, "bfloat16", Tensor.clone)
        for scale in (1.0, 0.001, 1.0):
            set_gradients(model, scale)
            set_whole_gradients(wholes.values(), scale)
            expected = nn.utils.clip_grad_norm_(wholes.values(), clip_grad)
            norm, skipped, _ = optimizer.step(RATE)
            for reference in references:
                reference.step()
            assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
            assert skipped.item() == 0.0
            assert all(parameter.grad is None for parameter in model.parameters())
    momenta = {n: t for n, t in optimizer.state_tensors().items() if n.endswith(".momentum")}
    for name, parameter in model.named_parameters():
        found, expected = whole(parameter), wholes[name].detach()
        if precision == "bf16" and f"{name}.momentum" in momenta:
            # As a whole: products in bf16 round their elements differently.
            distance = (found - expected).norm() / (expected - before[name]).norm()
            assert distance < 1e-2, f"{name}: {distance}"
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=name)
    buffers = references[0].state
    assert len(momenta) == len(buffers) == 14
    for name, momentum in momenta.items():
        buffer = buffers[wholes[name.removesuffix(".momentum")]]["momentum_buffer"]
        torch.testing.assert_close(whole(momentum), buffer, msg=name)
    assert optimizer.updates == 3


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_momentum_and_norm_are_those_of_pytorch_on_the_whole_model(
    world_size: int, tensor: int, precision: str
) -> None:
    run_ranks(world_size, _check_against_pytorch, tensor, precision)


def _sizes_of_updates(name: str) -> dict[str, float]:
    model, optimizer = built(1, name=name, weight_decay=0.0, eps=1e-8)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(3):
        set_gradients(model, 1.0)
        optimizer.step(RATE)
    return {
        key: float((whole(p) - whole(before[key])).square().mean().sqrt()) / (3 * RATE)
        for key, p in model.named_parameters()
        if p.dim() == 2
    }


def test_updates_of_the_matrices_are_as_large_as_adamw_s_are_in_practice() -> None:
    sizes = run_ranks(1, _sizes_of_updates, "muon")[0]
    for key, size in sizes.items():
        if key.startswith("blocks."):
            # A fifth of the learning rate; AdamW's, whose gradients here never change, all of it.
            assert 0.15 < size < 0.25, key
        else:
            assert size == pytest.approx(1.0, rel=0.01), key
