"""One run of several jobs, each on other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_bert.config.schema import Config
from megatron_bert.run.mirrors.following import curves
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train

# Twelve steps: where each job stops, its ranks and the keys that it changes.
JOBS: list[tuple[int, int, dict[str, Any]]] = [
    (3, 1, {}),
    (
        6,
        4,
        {
            "parallel": {"pipeline": 2, "tensor": 2, "sequence": True},
            "recompute": "full",
            "batch": {"micro_size": 3},
        },
    ),
    (9, 3, {"parallel": {"pipeline": 3}}),
    (12, 4, {"parallel": {"replicate": 2, "tensor": 2}, "recompute": "selective"}),
]


def _train_until(config: Config, last_step: int) -> list[dict[str, Any]]:
    return train(config, stop_after=last_step)


def _scores(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation line at whatever depth, but the time it took."""
    return {name: value for name, value in curves(line).items() if not name.endswith("seconds")}


def test_a_run_goes_on_whatever_ranks_its_next_job_gets(tiny_run: Callable[..., Config]) -> None:
    model = {"num_layers": 6}
    expected = run_ranks(1, _train_until, tiny_run("whole", model=model), 12)[0]
    for last_step, ranks, changes in JOBS:
        config = tiny_run("elastic", model=model, **changes)
        found = run_ranks(ranks, _train_until, config, last_step)[0]
    steps, expected_steps = steps_of(found), steps_of(expected)
    assert list(steps) == list(expected_steps) == list(range(1, 13))
    for step, line in steps.items():
        one = expected_steps[step]
        assert line["batch_hash"] == one["batch_hash"], step
        assert line["consumed_rows"] == one["consumed_rows"], step
        # Rounding differences of the first steps grow with each update.
        assert line["loss"] == pytest.approx(one["loss"], rel=1e-4), step
    # The three evaluations are each of another job, and so of another layout.
    scores, expected_scores = (
        [_scores(line) for line in lines if "valid_loss" in line] for lines in (found, expected)
    )
    assert len(scores) == len(expected_scores) == 3
    for line, one in zip(scores, expected_scores, strict=True):
        assert {"valid/valid/accuracy_by_replacement/masked", "valid/loss"} <= set(line)
        assert set(line) == set(one)
        differing = {name for name in line if line[name] != pytest.approx(one[name], rel=1e-4)}
        assert not any("loss" in name for name in differing)
        # A token on the edge between right and wrong counts in all, by replacement and by kind.
        assert len(differing) <= 3
