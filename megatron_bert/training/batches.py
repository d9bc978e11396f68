"""A rank's share of each step's rows, read ahead of the step.

Shape suffix: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megatron_bert.config.layout import BatchLayout
from megatron_bert.data.batch import Batch
from megatron_bert.data.source import RowSource

SURPLUS_ROW = -1


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one step and their division.

    Attributes:
        first_row: number of the first row within the run.
        end_row: rows from this one on do not belong to the batch: surplus, of weight 0.
        seq_length: token slots of each row.
        layout: how the rows are dealt to ranks and micro-batches.
    """

    first_row: int
    end_row: int
    seq_length: int
    layout: BatchLayout

    def micro_batches(self, source: RowSource, rank: int) -> Iterator[Batch]:
        """Assemble one data-parallel rank's micro-batches, in turn."""
        for micro_batch in range(self.layout.num_micro_batches):
            offsets = self.layout.row_offsets(rank, micro_batch)
            rows_B = np.arange(offsets.start, offsets.stop, offsets.step, dtype=np.int64)
            rows_B += self.first_row
            rows_B[rows_B >= self.end_row] = SURPLUS_ROW
            yield source.batch(rows_B, self.seq_length)


class ReadAhead:
    """Assembles a rank's micro-batches of the next step while the current one is computed.

    One thread is enough: the C++ core holds no GIL, and a step's rows take far less time to
    assemble than to learn from.
    """

    def __init__(self, source: RowSource, rank: int) -> None:
        self._source = source
        self._rank = rank
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: tuple[GlobalBatch, Future[list[Batch]]] | None = None

    def get(self, batch: GlobalBatch, following: GlobalBatch | None) -> list[Batch]:
        """Return the micro-batches of a step; read those of the following one ahead."""
        if self._ahead is None or self._ahead[0] != batch:
            self._ahead = self._submit(batch)
        micro_batches = self._ahead[1].result()
        self._ahead = None if following is None else self._submit(following)
        return micro_batches

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, batch: GlobalBatch) -> tuple[GlobalBatch, Future[list[Batch]]]:
        return batch, self._pool.submit(lambda: list(batch.micro_batches(self._source, self._rank)))
