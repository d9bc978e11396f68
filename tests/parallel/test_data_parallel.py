"""`fully_shard` with this project's policy."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_bert.optim.adamw import ShardedAdamW
from megatron_bert.parallel.data_parallel import set_gradient_sync
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
    model = small_model(small_config(), topology).train()
    for index in range(MICRO_BATCHES):
        set_gradient_sync(model, index == MICRO_BATCHES - 1)
        first_row = 2 * (MICRO_BATCHES * dist.get_rank() + index)
        model(*packed_inputs(2, first_row).values()).loss.backward()
    reference = whole_model(small_config(), topology).train()
    rows = 2 * MICRO_BATCHES * dist.get_world_size()
    reference(*packed_inputs(rows).values()).loss.backward()
    for (name, parameter), expected in zip(
        model.named_parameters(), reference.parameters(), strict=True
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
    optimizer = ShardedAdamW(model, config.optimizer, topology.tensor_parallel.rank)
    inputs = packed_inputs(4, first_row=4 * dist.get_rank())
    losses = []
    for _ in range(3):
        set_gradient_sync(model, True)
        loss = model.train()(*inputs.values()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step(0.05)
        if evaluate:
            with torch.no_grad():
                model.eval()(*inputs.values())
    return losses


def _check_evaluation_between_steps() -> None:
    losses = _losses(evaluate=False)
    assert len(set(losses)) == 3, "an update did not reach the gathered weights"
    assert _losses(evaluate=True) == losses


def test_no_step_computes_with_weights_gathered_before_the_last_update() -> None:
    run_ranks(2, _check_evaluation_between_steps)
