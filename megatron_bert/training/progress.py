"""What a run says while it goes: one plain line an interval."""

from __future__ import annotations

import logging

from megatron_bert.config.curriculum import Curriculum, StageSpan

logger = logging.getLogger(__name__)


class ProgressLine:
    """Prints loss, learning rate, speed and time left every so many steps."""

    def __init__(self, curriculum: Curriculum, interval: int, global_size: int) -> None:
        self._curriculum = curriculum
        self._interval = interval
        self._global_size = global_size
        self._slots = 0
        self._seconds = 0.0

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
        self._slots += self._global_size * span.seq_length
        self._seconds += seconds
        if step % self._interval and step != self._curriculum.total_steps:
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

    def _slots_left(self, step: int) -> int:
        curriculum = self._curriculum
        slots = curriculum.slots_until(curriculum.total_steps) - curriculum.slots_until(step)
        return slots * self._global_size


def format_duration(seconds: float) -> str:
    """Write a duration as people say it: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = int(seconds // 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
