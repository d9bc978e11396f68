"""Many dataclasses of numbers as one of arrays, with which many layouts are computed at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# What an attribute of such a dataclass is.
Number = TypeVar("Number", float, Floats)


def columns(records: Sequence[Any], index: NDArray[np.int64]) -> dict[str, Floats]:
    """Each attribute of dataclasses as an array, by its name.

    Args:
        records: of one class, at least one.
        index: which of them each element of the arrays is of.
    """
    return {
        field.name: np.array([getattr(record, field.name) for record in records], np.float64)[index]
        for field in fields(records[0])
    }
