"""Stages with a batch size, a masking rate and a learning-rate factor of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.schema import Config
from megatron_bert.data.step_inspection import describe_steps
from megatron_bert.errors import UserError
from megatron_bert.training.dry_run import dry_run
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train

Lines = dict[int, dict[str, Any]]

# Batches of 9, 12 and 5 rows, the first two of one length.
STAGES: list[dict[str, Any]] = [
    {"seq_length": 32, "steps": 4, "batch": {"global_size": 9}, "mlm": {"probability": 0.3}},
    {"seq_length": 32, "steps": 4, "lr_factor": 0.5},
    {"seq_length": 64, "steps": 3, "batch": {"global_size": 5}},
]
CONSTANT = {"decay": "constant", "warmup_steps": 1}


@pytest.fixture
def configure(tiny_run: Callable[..., Config]) -> Callable[..., Config]:
    """A run over these stages, named and changed by the arguments."""

    def configure(name: str = "run", **changes: Any) -> Config:
        return tiny_run(name, **{"curriculum": STAGES, "schedule": CONSTANT, **changes})

    return configure


def _train(config: Config, stop: dict[str, int]) -> list[dict[str, Any]]:
    return train(config, **stop)


def _run(config: Config, world_size: int = 1, **stop: int) -> Lines:
    return steps_of(run_ranks(world_size, _train, config, stop)[0])


def _planned_hashes(config: Config, first_step: int, last_step: int) -> list[str]:
    return [line.split()[-1] for line in describe_steps(config, first_step, last_step)]


def test_each_step_reads_the_rows_that_inspection_computes_and_counts_them(
    configure: Callable[..., Config],
) -> None:
    config = configure()
    lines = _run(config)
    assert [line["stage"] for line in lines.values()] == [0] * 4 + [1] * 4 + [2] * 3
    assert [line["batch_hash"] for line in lines.values()] == _planned_hashes(config, 1, 11)
    rows = [9, 18, 27, 36, 48, 60, 72, 84, 89, 94, 99]
    assert [line["consumed_rows"] for line in lines.values()] == rows
    assert lines[11]["tokens"] == 84 * 32 + 15 * 64
    rates = [line["lr"] for line in lines.values()]
    assert rates == pytest.approx([1e-2] * 4 + [0.5e-2] * 4 + [1e-2] * 3)
    masked_per_row = [lines[step]["masked_tokens"] / size for step, size in ((4, 9), (5, 12))]
    assert masked_per_row[0] == pytest.approx(2 * masked_per_row[1], rel=0.25)
    store = CheckpointStore(config.run.directory / "checkpoints", keep=10)
    saved = config.run.directory / "checkpoints" / "step_00000006"
    assert store.read_state(saved)["consumed_rows"] == 60


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_do_not_divide_a_stages_batch_train_alike(
    configure: Callable[..., Config], world_size: int
) -> None:
    expected = _run(configure("one"))
    found = _run(configure("many"), world_size)
    assert list(found) == list(expected)
    for step, line in found.items():
        for key in ("batch_hash", "masked_tokens", "consumed_rows"):
            assert line[key] == expected[step][key]
        tolerance = 1e-6 if step <= 3 else 1e-4
        assert line["loss"] == pytest.approx(expected[step]["loss"], rel=tolerance), step
        assert line["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=10 * tolerance)


@pytest.mark.parametrize("stop_after", [3, 4])
def test_a_stage_lengthened_in_mid_run_leaves_the_rows_seen_and_goes_on_as_if_planned(
    configure: Callable[..., Config], stop_after: int
) -> None:
    longer = [{**STAGES[0], "steps": 7}, *STAGES[1:]]
    expected = _run(configure("planned", curriculum=longer))
    begun = _run(configure("run"), stop_after=stop_after)
    lengthened = configure("run", curriculum=longer)
    taken = [line["batch_hash"] for line in begun.values()]
    assert len(taken) == stop_after
    assert _planned_hashes(lengthened, 1, stop_after) == taken
    found = _run(lengthened)
    assert list(found) == list(range(1, 15))
    for key in ("batch_hash", "loss", "grad_norm", "consumed_rows"):
        assert [line[key] for line in found.values()] == [line[key] for line in expected.values()]


def _refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


def test_a_stages_batch_size_changes_only_before_it_is_begun_and_only_in_a_branch(
    configure: Callable[..., Config],
) -> None:
    first = configure("run")
    _run(first, stop_after=6)
    begun = [STAGES[0], {**STAGES[1], "batch": {"global_size": 24}}, STAGES[2]]
    later = [*STAGES[:2], {**STAGES[2], "batch": {"global_size": 10}}]
    resume = {"resume": str(first.run.directory / "checkpoints" / "step_00000006")}
    message = run_ranks(1, _refused, configure("branch", curriculum=begun, checkpoint=resume))[0]
    assert "curriculum.1.batch.global_size: was 12, is 24; cannot change" in message
    message = run_ranks(1, _refused, configure("run", curriculum=later))[0]
    assert "curriculum.2.batch.global_size: was 5, is 10; may change only in a new run" in message
    lines = _run(configure("branch", curriculum=later, checkpoint=resume))
    assert [line["consumed_rows"] for line in lines.values()] == [72, 84, 94, 104, 114]


def test_evaluation_masks_as_the_stage_does_and_once_more_as_all_stages_are_compared(
    configure: Callable[..., Config],
) -> None:
    fixed = {"interval": 4, "batches": 2, "fixed_seq_length": 32}
    config = configure(eval=fixed, optimizer={"lr": 1e-9, "min_lr": 0.0})
    lines = run_ranks(1, _train, config, {})[0]
    evaluations = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 11]
    scores = [line["valid"]["valid"] for line in evaluations]
    # The model stays as it was, so that only rows and masks tell the scores apart.
    assert scores[0]["loss"] != scores[0]["fixed_loss"]
    assert scores[1]["loss"] == scores[1]["fixed_loss"]
    assert scores[2]["fixed_loss"] == pytest.approx(scores[0]["fixed_loss"], abs=1e-5)


def test_the_plan_tells_what_the_stages_differ_in(
    configure: Callable[..., Config],
    tiny_run: Callable[..., Config],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    dry_run(configure(), 2)
    stages = [message for message in caplog.messages if ": length " in message]
    assert "9 rows a step, 30 % masked, learning rate x 1, 16 masked slots a row" in stages[0]
    assert "2 x 3 rows a rank, 3 surplus rows" in stages[0]
    assert "12 rows a step, 15 % masked, learning rate x 0.5, 12 masked slots a row" in stages[1]
    assert f"{84 * 32 + 15 * 64:,} token slots" in caplog.text
    caplog.clear()
    dry_run(tiny_run(), 2)
    assert "rows a step" not in caplog.text
    assert "% masked" not in caplog.text


def test_the_plan_warns_once_of_a_corpus_that_is_read_too_often(
    tiny_run: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny_run(curriculum=[{"seq_length": 64, "steps": 100}])
    dry_run(config, 1)
    (warning,) = [message for message in caplog.messages if message.startswith("warning")]
    assert f"{config.data.train[0].prefix} is read " in warning
    assert "shorten the curriculum" in warning
