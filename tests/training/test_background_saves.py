"""Runs whose checkpoints are written while they train, and runs whose checkpoints fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_bert.config.schema import Config
from megatron_bert.errors import CheckpointError
from megatron_bert.run.metrics import read
from tests.checkpoint.host_calls import before_host_calls, disk_full_at
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train

KILLED_IN = (2, 4, 5, 8, 11)
EXACT = ("loss", "grad_norm", "batch_hash", "consumed_rows")


def _losses(config: Config, **stop: int) -> dict[int, list[object]]:
    lines = steps_of(train(config, **stop))
    return {step: [line[key] for key in EXACT] for step, line in lines.items()}


def _check_kills(uncut: Config, killed: Config) -> None:
    expected = _losses(uncut)
    # Every job begins from what the one before had saved when it was killed.
    for kill_in in KILLED_IN:
        seen = _losses(killed, kill_in=kill_in)
        before = {step: facts for step, facts in expected.items() if step < kill_in}
        assert seen == before, f"killed in step {kill_in}"
    assert _losses(killed) == expected


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_beside_a_save_resumes_with_the_bits_of_one_that_saved_in_turn(
    tiny_run: Callable[..., Config], world_size: int
) -> None:
    killed = tiny_run("killed", checkpoint={"interval": 1, "async": True})
    run_ranks(world_size, _check_kills, tiny_run("uncut"), killed)


def _train_without_room(config: Config, pattern: str) -> str | None:
    with before_host_calls(disk_full_at("write", pattern)):
        try:
            train(config)
        except CheckpointError as error:
            return str(error)
    return None


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_save_does_not_end_a_run(
    tiny_run: Callable[..., Config], in_background: bool
) -> None:
    config = tiny_run(checkpoint={"async": in_background, "max_failures": 2})
    assert run_ranks(2, _train_without_room, config, "step_*[39].tmp-*/shard-*") == [None, None]
    saved = sorted(path.name for path in (config.run.directory / "checkpoints").iterdir())
    assert saved == ["latest", "step_00000006", "step_00000012"]


@pytest.mark.parametrize(("in_background", "last_step"), [(False, 9), (True, 12)])
def test_too_many_failed_saves_in_a_row_end_the_run_on_all_ranks(
    tiny_run: Callable[..., Config], in_background: bool, last_step: int
) -> None:
    config = tiny_run(
        checkpoint={"async": in_background},
        curriculum=[{"seq_length": 32, "steps": 15}],
        schedule={"warmup_steps": 1},
    )
    errors = run_ranks(2, _train_without_room, config, "shard-*")
    assert errors[0] == errors[1]
    assert "step_00000009" in errors[0]
    assert "3 saves in a row failed (checkpoint.max_failures=3)" in errors[0]
    lines = read(config.run.directory / "metrics.jsonl")
    assert list(steps_of(lines)) == list(range(1, last_step + 1))


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_whose_last_save_fails_ends_with_an_error(
    tiny_run: Callable[..., Config], in_background: bool
) -> None:
    config = tiny_run(checkpoint={"async": in_background})
    for error in run_ranks(2, _train_without_room, config, "step_*12.tmp-*/shard-*"):
        assert error is not None
        assert "step_00000012" in error
        assert "make room" in error
