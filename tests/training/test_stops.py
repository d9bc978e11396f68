from __future__ import annotations

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


def test_a_second_interrupt_from_the_keyboard_does_not_wait() -> None:
    StopRequests(None)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_deadline_is_a_reason_once_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("megatron_bert.training.stops.time.monotonic", lambda: now)
    stops = StopRequests(2.0)
    now = 219.0
    assert stops.reason is None
    now = 220.0
    assert stops.reason == "run.max_minutes"
