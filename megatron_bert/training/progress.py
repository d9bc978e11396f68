"""What a run says while it goes: one plain line an interval, on a terminal a bar below them."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_bert.config.curriculum import Curriculum, StageSpan

logger = logging.getLogger(__name__)


class ProgressLine:
    """Prints loss, learning rate, speed and time left every so many steps.

    The first step of a job and of each stage has a line as well: with few steps nothing would be
    heard of a stage, and after the first one it is known whether the rest can work.
    """

    def __init__(self, curriculum: Curriculum, interval: int) -> None:
        self._curriculum = curriculum
        self._interval = interval
        self._stage: int | None = None
        self._slots = 0
        self._seconds = 0.0
        self._bar: _Bar | None = None

    def after_step(
        self,
        step: int,
        span: StageSpan,
        *,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        seconds: float,
    ) -> None:
        """Count a step that took `seconds` and print the line when it is due."""
        self._slots += span.slots_per_step
        self._seconds += seconds
        if self._bar is None and sys.stderr.isatty():
            self._bar = _Bar(step - 1, self._curriculum.total_steps)
        if self._bar is not None:
            self._bar.move(step, loss)
        enters, self._stage = span.index != self._stage, span.index
        if not enters and step % self._interval and step != self._curriculum.total_steps:
            return
        speed = self._slots / self._seconds
        self._slots, self._seconds = 0, 0.0
        logger.info(
            "step %s/%s · stage %d/%d (%d) · loss %.4f · lr %.2e · grad %.2f · %s tokens/s · "
            "%s left",
            f"{step:,}",
            f"{self._curriculum.total_steps:,}",
            span.index + 1,
            len(self._curriculum.spans),
            span.seq_length,
            loss,
            learning_rate,
            grad_norm,
            f"{speed:,.0f}",
            format_duration(self._slots_left(step) / speed),
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _slots_left(self, step: int) -> int:
        return self._curriculum.total_slots - self._curriculum.slots_until(step)


class _Bar:
    """A bar on standard error; logged lines are printed above it, not through it."""

    def __init__(self, done: int, total: int) -> None:
        self._redirection = logging_redirect_tqdm()
        self._redirection.__enter__()
        self._bar: tqdm[NoReturn] = tqdm(total=total, initial=done, unit="step", leave=False)

    def move(self, step: int, loss: float) -> None:
        """Show that `step` was taken."""
        self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
        self._redirection.__exit__(None, None, None)


def format_duration(seconds: float) -> str:
    """Write a duration as people say it: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = int(seconds // 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
