from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_bert.config.layout import BatchLayout
from megatron_bert.config.schema import BatchConfig, Corpus
from megatron_bert.training.batches import SURPLUS_ROW, GlobalBatch, ReadAhead
from megatron_bert.training.evaluation import corpus_names


class _Source:
    """Returns the row numbers in place of their content, and remembers what was read."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def batch(self, rows_B: NDArray[np.int64], seq_length: int) -> Any:
        self.read.append(rows_B.tolist())
        return rows_B.tolist()


def _global_batch(step: int, ranks: int, micro_size: int, rows: int = 10) -> GlobalBatch:
    layout = BatchLayout.for_stage(
        BatchConfig(global_size=rows, micro_size=micro_size), ranks, seq_length=32
    )
    return GlobalBatch((step - 1) * rows, step * rows, 32, layout)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_size", [1, 2, 3, 10])
def test_ranks_and_micro_batches_of_one_shape_share_out_every_row_once(
    ranks: int, micro_size: int
) -> None:
    part = _global_batch(3, ranks, micro_size)
    shares: Sequence[Any] = [list(part.micro_batches(_Source(), rank)) for rank in range(ranks)]
    assert {len(micro) for share in shares for micro in share} == {part.layout.micro_size}
    rows = [row for share in shares for micro in share for row in micro]
    assert sorted(row for row in rows if row != SURPLUS_ROW) == list(range(20, 30))
    assert rows.count(SURPLUS_ROW) == part.layout.surplus_rows


def test_the_following_step_is_read_ahead_and_not_again() -> None:
    source = _Source()
    reader = ReadAhead(source, rank=0)  # type: ignore[arg-type]
    first, second = (_global_batch(step, 1, 10) for step in (1, 2))
    assert reader.get(first, second) == [list(range(10))]
    assert reader.get(second, None) == [list(range(10, 20))]
    reader.close()
    assert source.read == [list(range(10)), list(range(10, 20))]


def test_another_step_than_the_one_read_ahead_is_read_all_the_same() -> None:
    reader = ReadAhead(_Source(), rank=0)  # type: ignore[arg-type]
    reader.get(_global_batch(1, 1, 10), _global_batch(2, 1, 10))
    assert reader.get(_global_batch(5, 1, 10), None) == [list(range(40, 50))]
    reader.close()


def test_corpora_of_one_name_in_two_folders_are_told_apart_in_metrics() -> None:
    corpora = [Corpus(prefix=prefix) for prefix in ("ja/valid", "en/valid", "en/code")]
    assert corpus_names(corpora) == ["ja/valid", "en/valid", "code"]
