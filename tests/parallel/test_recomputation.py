"""Activations computed again are the same activations, and fewer of them are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bert.parallel.sharding import local_part
from tests.distributed_harness import run_ranks
from tests.small_model import (
    cpu_topology,
    packed_inputs,
    small_config,
    small_model,
    whole_model,
)

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


def kept_bytes(changes: dict[str, Any], **sizes: Any) -> int:
    """Bytes that one micro-batch's forward pass keeps for its backward pass, weights left out."""
    model = whole_model(small_config(**changes), cpu_topology(**sizes)).train()
    parameters = {local_part(p).untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*packed_inputs(4))
    del output
    return sum(size for address, size in kept.items() if address not in parameters)


def _train(recompute: str, tensor: int) -> tuple[list[float], list[Tensor]]:
    config = small_config(model=DROPOUT, recompute=recompute)
    model = small_model(config, cpu_topology(tensor=tensor, sequence_parallel=tensor > 1))
    micro_batches = [packed_inputs(2), packed_inputs(2, first_row=2)]
    losses = [model.runner.train(micro_batches, torch.tensor(7.0)).item() for _ in range(2)]
    gradients = [p.grad for p in model.named_parameters().values()]
    return losses, [g.to_local() if hasattr(g, "to_local") else g for g in gradients]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_bits_dropout_included(
    recompute: str, tensor: int
) -> None:
    expected = run_ranks(tensor, _train, "none", tensor)
    for (losses, gradients), (other_losses, others) in zip(
        run_ranks(tensor, _train, recompute, tensor), expected, strict=True
    ):
        assert losses == other_losses
        for gradient, other in zip(gradients, others, strict=True):
            assert torch.equal(gradient, other)


def test_less_is_kept_the_more_is_recomputed() -> None:
    none, selective, full = (
        run_ranks(1, kept_bytes, {"model": DROPOUT, "recompute": how})[0]
        for how in ("none", "selective", "full")
    )
    assert full < 0.4 * selective < 0.4 * none


def test_evaluation_recomputes_nothing() -> None:
    run_ranks(1, _check_evaluation)


def _check_evaluation() -> None:
    plain, recomputing = (
        small_model(small_config(model=DROPOUT, recompute=how), cpu_topology()).runner
        for how in ("none", "full")
    )
    (expected,), (found,) = (runner.evaluate([packed_inputs(2)]) for runner in (plain, recomputing))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.correct_N, expected.correct_N)
