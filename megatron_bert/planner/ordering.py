"""Which of the layouts that are about as quick comes first."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megatron_bert.planner.arrays import Floats
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.machines import Machine

# Layouts as quick as this are alike. First come those that leave memory to what nobody predicts,
# and of them the simplest: it has the least that can be slower than is predicted.
ALIKE_PERCENT = 0.5
SCARCE_PERCENT = 5.0


def band_of(seconds: Floats) -> NDArray[np.int64]:
    """How many times `ALIKE_PERCENT` each lies above the quickest."""
    wide = math.log1p(ALIKE_PERCENT / 100)
    bands: NDArray[np.int64] = (np.log(seconds / seconds.min()) / wide).astype(np.int64)
    return bands


def is_scarce(peaks: Floats, machine: Machine) -> NDArray[np.bool_]:
    """Whether so little memory is left that a prediction's error may take it."""
    scarce: NDArray[np.bool_] = peaks > (1 - SCARCE_PERCENT / 100) * machine.usable_bytes
    return scarce


def parts_of(layout: Layout) -> float:
    """How far a layout is from the simplest: how often the model is halved, and what is beside."""
    split = layout.split
    halves = math.log2(split.tensor) + math.log2(split.num_stages)
    return halves + split.sequence + (layout.recompute != "none")
