"""Losses and gradients that are not finite, in real runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from megatron_bert.config.schema import Config
from megatron_bert.parallel.sharding import local_part
from megatron_bert.training import trainer
from megatron_bert.training.divergence import DivergedError
from megatron_bert.training.step import StepResult, take_step
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train


def _spoiled(bad_rank: int, bad_steps: Sequence[int], where: str) -> Callable[..., StepResult]:
    """A `take_step` whose rank's own loss, or a gradient of whose parameters, is NaN in steps."""
    taken = 0

    def spoiled(model: Any, train: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*batch: Any) -> Tensor:
            loss = train(*batch)
            if where == "loss":
                return loss * math.nan
            local_part(next(iter(model.named_parameters().values())).grad).mul_(math.nan)
            return loss

        return run

    def take(model: Any, optimizer: Any, *rest: Any) -> StepResult:
        nonlocal taken
        taken += 1
        if taken not in bad_steps or dist.get_rank() != bad_rank:
            return take_step(model, optimizer, *rest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.runner, "train", spoiled(model, model.runner.train))
            return take_step(model, optimizer, *rest)

    return take


def _train_spoiled(
    config: Config, bad_rank: int, bad_steps: Sequence[int], where: str
) -> tuple[list[dict[str, Any]], str | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "take_step", _spoiled(bad_rank, bad_steps, where))
        try:
            return train(config), None
        except DivergedError as error:
            return [], str(error)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_number_on_one_rank_skips_that_update_and_nothing_else(
    tiny_run: Callable[..., Config], where: str
) -> None:
    config = tiny_run(optimizer={"max_skipped": 2})
    lines, _ = run_ranks(2, _train_spoiled, config, 1, [4, 5, 8], where)[0]
    steps = steps_of(lines)
    assert [step for step, line in steps.items() if line["skipped"]] == [4, 5, 8]
    assert list(steps) == list(range(1, 13))
    assert all(math.isfinite(line["loss"]) for line in steps.values() if not line["skipped"])
    assert steps[5]["rows"] == [48, 59]


@pytest.mark.parametrize(
    ("world_size", "parallel", "bad_rank"),
    [(3, {}, 2), (2, {"pipeline": 2}, 1), (2, {"tensor": 2}, 0)],
    ids=["data", "pipeline", "tensor"],
)
def test_too_many_bad_losses_in_a_row_end_all_ranks_with_steps_ranks_and_rows(
    tiny_run: Callable[..., Config], world_size: int, parallel: dict[str, Any], bad_rank: int
) -> None:
    config = tiny_run(optimizer={"max_skipped": 2}, parallel=parallel)
    results = run_ranks(world_size, _train_spoiled, config, bad_rank, [2, 4, 5, 6, 7], "loss")
    errors = [error for _, error in results]
    assert len(set(errors)) == 1
    assert errors[0] is not None
    assert "step 6: loss or gradient was not finite in 3 steps in a row, 4 to 6" in errors[0]
    assert "optimizer.max_skipped=2" in errors[0]
    assert "rows 36 to 71" in errors[0]
    assert f"not finite were the loss on rank {bad_rank} (" in errors[0]
    new_run = f"run.dir=NEW checkpoint.resume={config.run.directory}/checkpoints/step_NUMBER"
    assert f"optimizer.lr=LOWER {new_run}; where there is none, begin anew" in errors[0]


def test_a_bad_gradient_is_told_by_the_ranks_that_hold_it(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run(optimizer={"max_skipped": 0})
    for _, error in run_ranks(2, _train_spoiled, config, 0, [3], "gradient"):
        assert error is not None
        assert "not finite were the gradient on rank 0 (" in error
