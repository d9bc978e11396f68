"""Reasons to stop before the end: signals and the deadline."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """Remembers that this rank was asked to stop; all ranks then agree on the step.

    Signals are noted, and the first one is acknowledged: the current step is finished and a
    checkpoint written. A second SIGINT, from someone who does not want to wait, interrupts at once.

    Attributes:
        seconds_to_end: how long the job needs from now to the end of its last save, if it does not
            stop after the current step; the deadline counts as reached that much earlier.
        interrupt: the exception that the second SIGINT raised. Layers in between may have turned it
            into an error of their own.
    """

    def __init__(
        self,
        max_minutes: float | None = None,
        deadline: float | None = None,
        *,
        began: float | None = None,
        signals: Iterable[signal.Signals] = STOP_SIGNALS,
    ) -> None:
        """Listen for signals.

        Args:
            max_minutes: `run.max_minutes`, from `began` on.
            deadline: `run.deadline`, in seconds since 1970.
            began: when the job began, on the monotonic clock; default: now.
            signals: which to listen for.
        """
        self._limits: dict[str, float] = {}
        """When the job must have ended, on the monotonic clock, by the key that sets it."""
        if max_minutes is not None:
            start = time.monotonic() if began is None else began
            self._limits["run.max_minutes"] = start + 60.0 * max_minutes
        if deadline is not None:
            self._limits["run.deadline"] = time.monotonic() + deadline - time.time()
        self._signal: signal.Signals | None = None
        self._settled = False
        self.seconds_to_end = 0.0
        self.interrupt: KeyboardInterrupt | None = None
        for number in signals:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._settled:
            return
        if self._signal is None:
            self._signal = signal.Signals(number)
            _answer(
                f"{self._signal.name}: asked to stop and save after this step; Ctrl-C (again) ends "
                "at once, without saving"
            )
        elif number == signal.SIGINT:
            self.interrupt = KeyboardInterrupt(
                "interrupted before the step was saved; the same command goes on from the last "
                "checkpoint, where there is one"
            )
            raise self.interrupt

    def settle(self) -> None:
        """Ignore signals from here on: the last step is saved, and nothing is left to cut short."""
        self._settled = True

    @property
    def reason(self) -> str | None:
        """Why to stop, or None to go on."""
        if self._signal is not None:
            return f"signal {self._signal.name}"
        end = time.monotonic() + self.seconds_to_end
        return next((key for key, limit in self._limits.items() if end >= limit), None)


def _answer(text: str) -> None:
    """Write to the terminal or log from a signal handler; the first rank speaks for all.

    It bypasses `sys.stderr`: the signal may have interrupted a write to it, which is not reentrant.
    """
    if os.environ.get("RANK", "0") == "0":
        # Ctrl-C ends a `| tee` too: that nobody reads this must not keep the run from saving.
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
