"""What a step costs beside forward, backward and update."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import pytest
import torch

from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch
from megatron_bert.training import trainer
from megatron_bert.training.step import StepResult
from megatron_bert.training.step_parts import StepParts
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train

STEPS, WARM_UP_STEPS = 400, 50
ALLOWED_SECONDS = 3e-3


def _compute_nothing(
    _model: object, _optimizer: object, batches: Sequence[Batch], _masked: int, _rate: float
) -> StepResult:
    assert len(batches) == 1
    parts = StepParts(torch.device("cpu"))
    for name in ("model", "optimizer"):
        parts.end(name)
    return StepResult(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), parts)


def _median_step_seconds(config: Config) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "take_step", _compute_nothing)
        steps = steps_of(train(config))
    return statistics.median(
        line["step_seconds"] for step, line in steps.items() if step > WARM_UP_STEPS
    )


@pytest.mark.slow
def test_a_step_without_a_model_takes_under_three_milliseconds(
    tiny_run: Callable[..., Config],
) -> None:
    # 8,192 slots a step: reading and masking rows, agreeing, recording, watching the ranks' pace.
    config = tiny_run(
        curriculum=[{"seq_length": 64, "steps": STEPS}],
        batch={"global_size": 128, "micro_size": 128},
        mlm={"unit": "token"},
        checkpoint={"interval": STEPS},
        eval={"interval": STEPS},
        log={"interval": 10},
    )
    (seconds,) = run_ranks(1, _median_step_seconds, config)
    assert seconds < ALLOWED_SECONDS, f"{1e3 * seconds:.2f} ms a step"
