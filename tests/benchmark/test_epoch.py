from __future__ import annotations

import numpy as np
import pytest

from megatron_bert.benchmark.data import epoch
from megatron_bert.benchmark.data.epoch import count_epoch


def test_an_epoch_is_counted_slot_by_slot() -> None:
    # Rows of 8 hold 6 tokens beside [CLS] and [SEP]: 6 of the document's 10 in the first, 4 in the
    # second, where 2 slots stay empty.
    counted = count_epoch(np.array([10], dtype=np.int32), 8)
    assert counted.filled == 14 / 16
    assert counted.seen_once == 1


def test_every_token_of_many_documents_is_seen_once() -> None:
    lengths = np.random.default_rng(0).integers(0, 300, 5000, dtype=np.int32)
    counted = count_epoch(lengths, 64)
    assert counted.seen_once == 1
    assert 0.99 < counted.filled < 1


class ForgetfulPlan:
    """Forgets every second row, and makes the one before it twice."""

    def __init__(self, *arguments: object, **named: object) -> None:
        self._plan = RowPlan(*arguments, **named)  # type: ignore[arg-type]

    def segments(self, row: int) -> list[tuple[int, int, int, int]]:
        return self._plan.segments(row // 2 * 2)


RowPlan = epoch.RowPlan


def test_tokens_left_out_or_seen_twice_are_not_counted_as_seen_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(epoch, "RowPlan", ForgetfulPlan)
    assert count_epoch(np.full(1000, 30, dtype=np.int32), 32).seen_once == 0
