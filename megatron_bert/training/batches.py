"""A rank's share of each step's rows, read ahead of the step.

Shape suffix: B rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_bert.config.layout import BatchLayout
from megatron_bert.data.batch import Batch, RowArrays
from megatron_bert.data.source import RowSource
from megatron_bert.training.staging import HostMemory, StagingBuffer

SURPLUS_ROW = -1


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one step and their division.

    Attributes:
        rows: their numbers within the run.
        stage: the stage of the row source that they belong to.
        layout: how they are dealt to ranks and micro-batches.
    """

    rows: range
    stage: int
    layout: BatchLayout

    def share(self, rank: int, micro_batch: int) -> NDArray[np.int64]:
        """Rows of one data-parallel rank's micro-batch, [B]; surplus rows at its end."""
        offsets = self.layout.row_offsets(rank, micro_batch)
        rows_B = np.arange(offsets.start, offsets.stop, offsets.step, dtype=np.int64)
        rows_B += self.rows.start
        rows_B[rows_B >= self.rows.stop] = SURPLUS_ROW
        return rows_B


class ReadAhead(Iterator[list[Batch]]):
    """Assembles a rank's micro-batches of the next step while the current one is computed.

    The C++ core holds no GIL, so that threads are enough. Two steps' memory is used in turn: what
    a step read is gone once the next step is asked for.

    Args:
        source: where the rows come from.
        rank: within data parallelism.
        batches: of the steps, in turn.
        memory: where the rows are assembled.
        threads: how many assemble at a time, each other rows; the result is the same.
    """

    def __init__(
        self,
        source: RowSource,
        rank: int,
        batches: Iterable[GlobalBatch],
        memory: HostMemory,
        threads: int,
    ) -> None:
        self._source = source
        self._rank = rank
        self._batches = iter(batches)
        self._threads = threads
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="read-ahead")
        self._free = [StagingBuffer(memory), StagingBuffer(memory)]
        self._in_use: StagingBuffer | None = None
        self._ahead = self._start()

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of the next step, and read those of the following one ahead.

        The caller has asked for all copies that it makes of the batches before.

        Raises:
            DataError: a row cannot be assembled.
        """
        ahead = self._ahead
        if ahead is None:
            raise StopIteration
        if self._in_use is not None:
            self._in_use.release()
            self._free.append(self._in_use)
        self._in_use, self._ahead = ahead.buffer, self._start()
        return ahead.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> _Step | None:
        """Have the threads assemble the next step; None after the last one."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        buffer, layout = self._free.pop(), batch.layout
        arrays = buffer.claim(layout.rows_per_rank, *self._source.row_shape(batch.stage))
        micro_batches = [
            arrays.part(first, first + layout.micro_size)
            for first in range(0, layout.rows_per_rank, layout.micro_size)
        ]
        hashes = [
            self._pool.submit(self._assemble, batch, micro_batches, buffer, thread)
            for thread in range(self._threads)
        ]
        return _Step(buffer, micro_batches, hashes)

    def _assemble(
        self,
        batch: GlobalBatch,
        micro_batches: Sequence[RowArrays],
        buffer: StagingBuffer,
        thread: int,
    ) -> list[int]:
        """Assemble one thread's part of every micro-batch; return the parts' hashes."""
        buffer.wait_until_read()
        size = batch.layout.micro_size
        first, end = (size * part // self._threads for part in (thread, thread + 1))
        return [
            self._source.fill(batch.share(self._rank, number)[first:end], rows.part(first, end))
            for number, rows in enumerate(micro_batches)
        ]


@dataclass(frozen=True)
class _Step:
    """A step that is being assembled.

    Attributes:
        buffer: what it is assembled into.
        micro_batches: parts of the buffer.
        hashes: of each thread, once it is done: those of its parts of the micro-batches.
    """

    buffer: StagingBuffer
    micro_batches: list[RowArrays]
    hashes: list[Future[list[int]]]

    def result(self) -> list[Batch]:
        """Wait for the threads; raises what assembling raised."""
        by_thread = [future.result() for future in self.hashes]
        return [
            Batch.of(rows, sum(parts) % 2**64)
            for rows, *parts in zip(self.micro_batches, *by_thread, strict=True)
        ]
