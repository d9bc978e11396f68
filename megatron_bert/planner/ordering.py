"""Which of several layouts that are about equally fast comes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megatron_bert.planner.arrays import Floats
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.machines import Machine

# Layouts whose times differ by no more than this count as equal. Of those, layouts that leave
# memory for the unforeseen come first, and among them the simplest: it has the least that can turn
# out slower than predicted.
ALIKE_PERCENT = 0.5
# Predictions of memory were off by 5.3 % at most (docs/scaling.md).
SCARCE_PERCENT = 6.0


def in_bands(numbers: Iterable[int], seconds: Callable[[int], float]) -> Iterator[Iterator[int]]:
    """Group layouts that come with the fastest first: those of a group count as equal.

    Args:
        numbers: of the layouts.
        seconds: of a layout.
    """
    wide = math.log1p(ALIKE_PERCENT / 100)
    first = math.inf

    def band(number: int) -> int:
        nonlocal first
        first = min(first, seconds(number))
        return int(math.log(seconds(number) / first) / wide)

    for _, group in groupby(numbers, band):
        yield group


def is_scarce(peaks: Floats, machine: Machine) -> NDArray[np.bool_]:
    """Whether so little memory is left that the prediction's error may exceed it."""
    scarce: NDArray[np.bool_] = peaks > (1 - SCARCE_PERCENT / 100) * machine.usable_bytes
    return scarce


def parts_of(layout: Layout) -> float:
    """A layout's distance from the simplest: halvings of the model, plus its other features."""
    split = layout.split
    halves = math.log2(split.tensor) + math.log2(split.num_stages)
    return halves + split.sequence + (layout.recompute != "none")
