"""Losses far above those before them."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

# How many earlier steps a loss is compared with, and how many it takes to compare at all.
WINDOW = 100
_LEAST_STEPS = 20
# How far above the median a spike is: in standard deviations, and in nats where losses hardly vary.
_DEVIATIONS = 6.0
_LEAST_NATS = 0.1
# From median absolute deviation to standard deviation, for a normal distribution.
_DEVIATION_OF_MEDIAN = 1.4826


class SpikeWatch:
    """Compares each loss with those of the last 100 steps of its stage.

    The limit is their median plus six standard deviations, or plus 0.1 nats if that is more. The
    deviation is estimated from the median absolute deviation, so that earlier spikes do not raise
    the limit. A stage's first 20 steps are never spikes: rows of another length have another loss.
    """

    def __init__(self, earlier: Iterable[tuple[float, int]] = ()) -> None:
        """Begin with the losses and stages of the steps before, in their order."""
        self._stage: int | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        for loss, stage in earlier:
            self._add(loss, stage)

    def limit_exceeded(self, loss: float, stage: int) -> float | None:
        """Add a finite loss; return the limit if the loss exceeds it, else None."""
        limit = self._limit() if stage == self._stage else None
        self._add(loss, stage)
        return limit if limit is not None and loss > limit else None

    def _add(self, loss: float, stage: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self._losses.clear()
        self._losses.append(loss)

    def _limit(self) -> float | None:
        if len(self._losses) < _LEAST_STEPS:
            return None
        median = statistics.median(self._losses)
        spread = statistics.median(abs(loss - median) for loss in self._losses)
        return median + max(_LEAST_NATS, _DEVIATIONS * _DEVIATION_OF_MEDIAN * spread)
