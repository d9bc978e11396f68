"""Reasons to stop before the end: signals and the deadline."""

from __future__ import annotations

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """Remembers that this rank was asked to stop; all ranks then agree on the step.

    Signals are only noted: the step in hand is finished and a checkpoint written. A second
    SIGINT, from someone who does not want to wait, interrupts at once.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._signal: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)

    @property
    def reason(self) -> str | None:
        """Why to stop, or None to go on."""
        if self._signal is not None:
            return f"signal {self._signal.name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "run.max_minutes"
        return None
