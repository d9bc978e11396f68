"""Histograms of lengths in text: bars over lengths 0, 1, 2-3, 4-7, ..."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_BAR_WIDTH = 50
_BUCKETS = 64


def count_lengths(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many lengths are 0, 1, 2-3, 4-7, ..., `[64]`; the counts of parts can be summed.

    Text lengths span orders of magnitude, so that buckets of equal width would show little.
    """
    return np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=_BUCKETS)


def histogram(counts: npt.NDArray[np.int64]) -> Iterator[str]:
    """Yield a line with a bar for each bucket of `count_lengths`, first used to last used."""
    used = np.flatnonzero(counts)
    if not len(used):
        return
    for bucket in range(used[0], used[-1] + 1):
        low = 1 << bucket >> 1
        high = max(low, (1 << bucket) - 1)
        bar = "#" * int(np.ceil(_BAR_WIDTH * counts[bucket] / counts.max()))
        yield f"{low:>12,} - {high:<12,} {counts[bucket]:>12,} {bar}"
