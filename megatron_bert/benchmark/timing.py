"""Repeated timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """How long the repetitions of one piece of work took.

    The shortest is the figure to use: others are longer mostly for reasons outside the work. The
    median shows by how much.
    """

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The shortest, in seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)


def time_in_turns(works: Sequence[Callable[[], object]], repetitions: int) -> list[Timing]:
    """Time several pieces of work in turns, so that a slow minute of the machine affects all."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repetitions):
        for work, taken in zip(works, seconds, strict=True):
            begin = time.perf_counter()
            result = work()
            taken.append(time.perf_counter() - begin)
            # Freed here, so that freeing its memory is not timed.
            del result
    return [Timing(tuple(taken)) for taken in seconds]
