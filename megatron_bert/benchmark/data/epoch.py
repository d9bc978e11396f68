"""What the rows of one epoch hold: the share of slots filled and of tokens seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from _megatron_bert_core import RowPlan, epoch_rows
from numpy.typing import NDArray

_SLOTS_OF_SPECIAL_TOKENS = 2


@dataclass(frozen=True)
class EpochFigures:
    """Counted over all rows of a corpus' first epoch.

    Attributes:
        filled: share of the slots that hold text, [CLS] or [SEP] rather than padding.
        seen_once: share of the corpus' tokens that occur in exactly one row.
    """

    filled: float
    seen_once: float


def count_epoch(lengths_D: NDArray[np.int32], seq_length: int) -> EpochFigures:
    """Plan one epoch of documents with these lengths and count, exactly."""
    rows = epoch_rows(lengths_D, seq_length)
    plan = RowPlan([lengths_D], [1.0], [(seq_length, rows)], seed=0)
    segments = [segment for row in range(rows) for segment in plan.segments(row)]
    _, documents, offsets, tokens = np.array(segments, dtype=np.int64).T
    used = int(tokens.sum()) + _SLOTS_OF_SPECIAL_TOKENS * len(segments)
    first_tokens = np.cumsum(lengths_D, dtype=np.int64) - lengths_D
    begins = first_tokens[documents] + offsets
    times_seen = _coverage(begins, begins + tokens, int(lengths_D.sum(dtype=np.int64)))
    return EpochFigures(
        filled=used / (rows * seq_length), seen_once=float(np.mean(times_seen == 1))
    )


def _coverage(
    begins: NDArray[np.int64], ends: NDArray[np.int64], num_tokens: int
) -> NDArray[np.int32]:
    """For each token, how many of the ranges [begin, end) contain it."""
    changes = np.zeros(num_tokens + 1, dtype=np.int32)
    np.add.at(changes, begins, 1)
    np.add.at(changes, ends, -1)
    return np.cumsum(changes, out=changes)[:-1]
