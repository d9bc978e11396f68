"""`fully_shard` with this project's policy."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_bert.training.optimizer import build_optimizer
from tests.distributed_harness import run_ranks
from tests.small_model import (
    cpu_topology,
    packed_inputs,
    small_config,
    small_model,
    whole_model,
)

MICRO_BATCHES = 2


def _whole_gradient(parameter: Tensor) -> Tensor:
    assert isinstance(parameter.grad, DTensor)
    return parameter.grad.full_tensor()


def _check_gradients() -> None:
    topology = cpu_topology()
    model = small_model(small_config(), topology)
    first_row = 2 * MICRO_BATCHES * dist.get_rank()
    micro_batches = [packed_inputs(2, first_row + 2 * index) for index in range(MICRO_BATCHES)]
    model.runner.train(micro_batches, torch.ones(()))
    reference = whole_model(small_config(), topology).train()
    rows = 2 * MICRO_BATCHES * dist.get_world_size()
    reference(*packed_inputs(rows).values())[0, 0].backward()
    for (name, parameter), expected in zip(
        model.named_parameters().items(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(
            _whole_gradient(parameter), expected.grad, rtol=1e-4, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_are_summed_over_ranks_and_micro_batches(world_size: int) -> None:
    run_ranks(world_size, _check_gradients)


def _losses(evaluate: bool) -> list[float]:
    config, topology = small_config(), cpu_topology()
    model = small_model(config, topology)
    optimizer = build_optimizer(config, model)
    inputs = packed_inputs(4, first_row=4 * dist.get_rank())
    losses = []
    for _ in range(3):
        losses.append(model.runner.train([inputs], torch.ones(())).item())
        optimizer.step(0.05)
        if evaluate:
            model.runner.evaluate([inputs])
    return losses


def _check_evaluation_between_steps() -> None:
    losses = _losses(evaluate=False)
    assert len(set(losses)) == 3, "an update did not reach the gathered weights"
    assert _losses(evaluate=True) == losses


def test_no_step_computes_with_weights_gathered_before_the_last_update() -> None:
    run_ranks(2, _check_evaluation_between_steps)
