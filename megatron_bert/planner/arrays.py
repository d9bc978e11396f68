"""Turning many dataclasses of numbers into one of arrays, to compute many layouts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# The type of an attribute of such a dataclass.
Number = TypeVar("Number", float, Floats)


def columns(records: Sequence[Any], index: NDArray[np.int64]) -> dict[str, Floats]:
    """Each attribute of some dataclass instances as an array, by its name.

    Args:
        records: instances of one class, at least one.
        index: for each element of the arrays, which record it comes from.
    """
    return {
        field.name: np.array([getattr(record, field.name) for record in records], np.float64)[index]
        for field in fields(records[0])
    }
