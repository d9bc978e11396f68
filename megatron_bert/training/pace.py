"""Estimates how long a job needs to end with a checkpoint, from its measured steps and saves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_bert.config.curriculum import Curriculum, StageSpan
from megatron_bert.training.due import Due

# The next steps are assumed to take as long as the slowest of this many recent ones.
_RECENT_STEPS = 10
# Factor on measured times, for steps and saves that take longer than those before.
_MARGIN = 1.5
# Write speed assumed per rank until a save was measured: that of a slow shared file system.
_UNMEASURED_BYTES_PER_SECOND = 50e6


class Pace:
    """Measures a job's steps and evaluations, and tells how long its end would take.

    Args:
        curriculum: gives the sizes of steps; times are assumed proportional to token slots.
        due: after which steps the run evaluates and saves.
        evaluation_slots: token slots that an evaluation in a stage reads.
        bytes_to_save: what this rank writes in a save.
        clock: monotonic time in seconds.

    Attributes:
        evaluation_seconds: what the last evaluation took, None before the first one.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        due: Due,
        *,
        evaluation_slots: Callable[[StageSpan], int],
        bytes_to_save: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._curriculum = curriculum
        self._due = due
        self._evaluation_slots = evaluation_slots
        self._unmeasured_save = bytes_to_save / _UNMEASURED_BYTES_PER_SECOND
        self._clock = clock
        self._seconds_per_slot: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.evaluation_seconds: float | None = None
        self._evaluation_seconds_per_slot: float | None = None
        self._under_way: int | None = None
        self._began = 0.0

    def begin(self, step: int) -> None:
        """Note that a step begins and that the one before it, if any, has ended."""
        now = self._clock()
        if self._under_way is not None:
            slots = self._curriculum.at(self._under_way).slots_per_step
            self._seconds_per_slot.append((now - self._began) / slots)
        self._under_way, self._began = step, now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block's time from the steps' times."""
        began = self._clock()
        yield
        self._began += self._clock() - began

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time the evaluation in the block, which follows the step that was begun last."""
        assert self._under_way is not None, "no step was begun"
        began = self._clock()
        yield
        self.evaluation_seconds = self._clock() - began
        slots = self._evaluation_slots(self._curriculum.at(self._under_way))
        self._evaluation_seconds_per_slot = self.evaluation_seconds / slots

    def seconds_to_end(self, save_seconds: float | None, *, saving: bool) -> float:
        """Estimate the seconds from now to the end of the last save if one more step is begun.

        This counts the step that begins now, the one after it, what is due after either, and the
        last save, each at half as long again as measured. In a job's first step no step is measured
        yet, so only saves count. An evaluation not measured yet is assumed to take as long as
        training on all that it reads.

        Args:
            save_seconds: how long the last save took, None before the first one.
            saving: whether one is in flight, which the last one will have to wait for.
        """
        assert self._under_way is not None, "no step was begun"
        first = self._under_way
        steps = range(first, min(first + 1, self._curriculum.total_steps) + 1)
        spans = {step: self._curriculum.at(step) for step in steps}
        per_slot = max(self._seconds_per_slot, default=0.0)
        step_seconds = per_slot * max(span.slots_per_step for span in spans.values())
        if self._evaluation_seconds_per_slot is not None:
            per_slot = self._evaluation_seconds_per_slot
        evaluations = sum(
            per_slot * self._evaluation_slots(span)
            for step, span in spans.items()
            if self._due.evaluation(step)
        )
        save = self._unmeasured_save if save_seconds is None else save_seconds
        # A save after the last of these steps is the last save itself.
        saves = sum(self._due.save(step) for step in steps[:-1]) + saving + 1
        return _MARGIN * (len(steps) * step_seconds + evaluations + saves * save)
