"""Maps values to places in a picture, and finds the round numbers for its edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bert.report.records import Floats

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
# Numbers below this are shorter written out.
_WRITTEN_OUT = 1e4
# Least ratio of a logarithmic scale's ends: a round number lies in any such range.
_LEAST_RATIO = 3.0
# Share of the range left free between a curve and the edges of its picture.
_MARGIN = 0.04
_TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
# A unit of time is used if at least this many of it are to be shown.
_LEAST_UNITS = 2.0


@dataclass(frozen=True)
class Scale:
    """Maps values to places along one edge.

    Attributes:
        low, high: the values at the ends.
        start, end: their places.
        logarithmic: whether equal ratios are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, values: Floats) -> Floats:
        """Where values lie; NaN where they have no place."""
        if self.logarithmic:
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = np.where(values > 0, np.log(values), np.nan)
            share = (logs - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (values - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the ends, about five of them."""
        if self.logarithmic:
            return _powers(self.low, self.high)
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if rough <= power * factor)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [count * step for count in range(first, last + 1)]


def scale_over(
    values: Sequence[Floats], start: float, end: float, *, logarithmic: bool = False
) -> Scale:
    """A scale with room for all finite values and a margin; an arbitrary one if there are none.

    Args:
        values: arrays of the values to place.
        start: where the least lies.
        end: where the greatest lies.
        logarithmic: whether to use a logarithmic scale; ignored if values are not positive, or
            hardly differ.
    """
    finite = [array[np.isfinite(array)] for array in values]
    every = np.concatenate(finite) if finite else np.empty(0)
    if not every.size:
        return Scale(0.0, 1.0, start, end)
    low, high = float(every.min()), float(every.max())
    if logarithmic and low > 0 and high / low >= _LEAST_RATIO:
        margin = (high / low) ** _MARGIN
        return Scale(low / margin, high * margin, start, end, logarithmic=True)
    if low == high:
        margin = abs(low) / 10 or 0.5
        return Scale(low - margin, high + margin, start, end)
    margin = _MARGIN * (high - low)
    return Scale(low - margin, high + margin, start, end)


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which a time is best expressed: its length in seconds, and its name."""
    return next(
        (unit for unit in _TIME_UNITS if seconds >= _LEAST_UNITS * unit[0]), _TIME_UNITS[-1]
    )


def short(value: float) -> str:
    """A number in few characters: 12.5k, 3M, 2e-5."""
    for size, suffix in _SUFFIXES:
        if abs(value) >= max(size, _WRITTEN_OUT):
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}".replace("e-0", "e-")


def _powers(low: float, high: float) -> list[float]:
    """About seven powers of ten; if they span less than three, with their multiples by 2 and 5."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    every = max(1, round((last - first) / 6)) if len(factors) == 1 else 1
    powers = [10.0**power for power in range(first, last + 1, every)]
    return [p * factor for p in powers for factor in factors if low <= p * factor <= high]
