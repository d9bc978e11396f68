from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from megatron_bert.config.schema import Config
from megatron_bert.run.directory import read_outcome
from megatron_bert.training.stops import STOP_SIGNALS, StopRequests
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train


@pytest.fixture(autouse=True)
def _handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_signal_and_deadline_a_run_goes_on() -> None:
    assert StopRequests(None).reason is None
    assert StopRequests(60.0).reason is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_named_and_interrupts_nothing(number: signal.Signals) -> None:
    stops = StopRequests(None)
    signal.raise_signal(number)
    assert stops.reason == f"signal {number.name}"


def test_the_first_signal_is_answered_at_once_and_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    StopRequests(None)
    signal.raise_signal(signal.SIGINT)
    answer = capfd.readouterr().err
    assert "SIGINT: asked to stop and save after this step; Ctrl-C (again) ends at once" in answer
    signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_the_first_rank_answers_for_all(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    stops = StopRequests(None)
    signal.raise_signal(signal.SIGTERM)
    assert stops.reason == "signal SIGTERM"
    assert capfd.readouterr().err == ""


def test_an_answer_that_nobody_can_read_is_no_error() -> None:
    stops = StopRequests(None)
    reading, writing = os.pipe()
    kept = os.dup(2)
    os.close(reading)
    try:
        os.dup2(writing, 2)
        signal.raise_signal(signal.SIGINT)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writing)
    assert stops.reason == "signal SIGINT"


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_an_interrupt_from_the_keyboard_after_another_signal_does_not_wait(
    first: signal.Signals,
) -> None:
    stops = StopRequests(None)
    signal.raise_signal(first)
    assert stops.interrupt is None
    with pytest.raises(KeyboardInterrupt, match="goes on from the last checkpoint") as caught:
        signal.raise_signal(signal.SIGINT)
    assert stops.interrupt is caught.value


def test_once_the_last_step_is_saved_nothing_interrupts() -> None:
    stops = StopRequests(None)
    signal.raise_signal(signal.SIGINT)
    stops.settle()
    signal.raise_signal(signal.SIGINT)
    assert stops.interrupt is None
    assert stops.reason == "signal SIGINT"


def test_the_deadline_is_a_reason_once_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("megatron_bert.training.stops.time.monotonic", lambda: now)
    stops = StopRequests(2.0)
    now = 219.0
    assert stops.reason is None
    now = 220.0
    assert stops.reason == "run.max_minutes"


def test_the_deadline_counts_from_the_beginning_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("megatron_bert.training.stops.time.monotonic", lambda: now)
    stops = StopRequests(2.0, began=70.0)
    now = 189.0
    assert stops.reason is None
    now = 190.0
    assert stops.reason == "run.max_minutes"


def test_the_deadline_is_reached_as_much_earlier_as_the_end_of_the_job_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("megatron_bert.training.stops.time.monotonic", lambda: now)
    stops = StopRequests(2.0)
    stops.seconds_to_end = 50.0
    now = 169.0
    assert stops.reason is None
    now = 170.0
    assert stops.reason == "run.max_minutes"


def test_a_moment_is_a_reason_once_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, date = 100.0, 1_700_000_000.0
    monkeypatch.setattr("megatron_bert.training.stops.time.monotonic", lambda: now)
    monkeypatch.setattr("megatron_bert.training.stops.time.time", lambda: date)
    stops = StopRequests(max_minutes=2.0, deadline=date + 60.0)
    stops.seconds_to_end = 10.0
    now = 149.0
    # A clock that is set right in the meantime changes nothing.
    date += 3600.0
    assert stops.reason is None
    now = 150.0
    assert stops.reason == "run.deadline"


class _SignalInStep(StopRequests):
    """Has its own process get a signal in a step, on the last rank only."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(None)
        self._number = number
        self._steps_to_signal = step

    @property
    def reason(self) -> str | None:
        self._steps_to_signal -= 1
        if self._steps_to_signal == 0 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), self._number)
        return super().reason


def _train_with_signal(config: Config, number: signal.Signals) -> list[dict[str, Any]]:
    return train(config, _SignalInStep(number, 5))


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {"pipeline": 2}), (3, {})],
    ids=["pipeline", "data"],
)
def test_a_signal_to_the_last_rank_stops_all_after_the_same_step_with_one_save(
    tiny_run: Callable[..., Config],
    world_size: int,
    parallel: dict[str, Any],
    number: signal.Signals,
) -> None:
    config = tiny_run(
        parallel=parallel, data={"threads": 2}, checkpoint={"interval": 100, "async": True}
    )
    lines = run_ranks(world_size, _train_with_signal, config, number)[0]
    assert list(steps_of(lines)) == [1, 2, 3, 4, 5]
    saved = sorted(path.name for path in (config.run.directory / "checkpoints").iterdir())
    assert saved == ["latest", "step_00000005"]
    told = read_outcome(config.run.directory)
    assert told is not None
    assert told.reason == f"signal {number.name} on rank {world_size - 1}"


def _train_past_the_deadline(config: Config) -> list[dict[str, Any]]:
    return train(config, StopRequests(1e-6))


def test_a_run_past_its_deadline_takes_one_step_and_saves(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    assert list(steps_of(run_ranks(2, _train_past_the_deadline, config)[0])) == [1]
    assert (config.run.directory / "checkpoints" / "step_00000001").is_dir()
