from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from megatron_bert.training.stops import STOP_SIGNALS, StopRequests


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
    assert "SIGINT: stopping after this step, and saving; Ctrl-C (again) ends at once" in answer
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
