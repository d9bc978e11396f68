"""Which of several layouts that are about equally fast comes first."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megatron_bert.planner.arrays import Floats
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.machines import Machine

# Layouts whose times differ by no more than this count as equal. Of those, layouts that leave
# memory for the unforeseen come first, and among them the simplest: it has the least that can turn
# out slower than predicted.
ALIKE_PERCENT = 0.5
SCARCE_PERCENT = 5.0


def band_of(seconds: Floats) -> NDArray[np.int64]:
    """How many times `ALIKE_PERCENT` each one is above the fastest."""
    wide = math.log1p(ALIKE_PERCENT / 100)
    bands: NDArray[np.int64] = (np.log(seconds / seconds.min()) / wide).astype(np.int64)
    return bands


def is_scarce(peaks: Floats, machine: Machine) -> NDArray[np.bool_]:
    """Whether so little memory is left that the prediction's error may exceed it."""
    scarce: NDArray[np.bool_] = peaks > (1 - SCARCE_PERCENT / 100) * machine.usable_bytes
    return scarce


def parts_of(layout: Layout) -> float:
    """A layout's distance from the simplest: halvings of the model, plus its other features."""
    split = layout.split
    halves = math.log2(split.tensor) + math.log2(split.num_stages)
    return halves + split.sequence + (layout.recompute != "none")
