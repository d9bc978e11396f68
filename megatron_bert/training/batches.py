"""A rank's share of each step's rows, read ahead of the step.

Shape suffix: B rows.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.data.batch import Batch, RowArrays
from megatron_bert.data.source import RowSource
from megatron_bert.training.staging import HostMemory, StagingBuffer

# `surplus_row` of csrc/batch.h.
SURPLUS_ROW = -1

# A check asks a file server about every file: once a step would be too often for short steps.
_SECONDS_BETWEEN_CHECKS = 1.0


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one step and their division.

    Attributes:
        rows: their numbers within the run.
        stage: the stage of the row source that they belong to.
        layout: how they are divided among ranks and micro-batches.
    """

    rows: range
    stage: int
    layout: BatchLayout

    def share(self, rank: int, micro_batch: int) -> NDArray[np.int64]:
        """Row numbers of one data-parallel rank's micro-batch, [B], padded with `SURPLUS_ROW`."""
        offsets = self.layout.row_offsets(rank, micro_batch)
        rows_B = np.arange(offsets.start, offsets.stop, offsets.step, dtype=np.int64)
        rows_B += self.rows.start
        rows_B[rows_B >= self.rows.stop] = SURPLUS_ROW
        return rows_B


class ReadAhead(Iterator[list[Batch]]):
    """Assembles a rank's micro-batches of the next step while the current one is computed.

    The C++ core releases the GIL, so threads suffice. Two buffers alternate between steps: a step's
    micro-batches are no longer valid once the next step is asked for.

    Args:
        source: where the rows come from.
        rank: within data parallelism.
        batches: the steps' global batches, in order.
        memory: where the rows are assembled.
        threads: how many share each step's rows; the result is the same for any number.
        clock: monotonic time in seconds; decides when to check again that the data files are
            unchanged.
    """

    def __init__(
        self,
        source: RowSource,
        rank: int,
        batches: Iterable[GlobalBatch],
        memory: HostMemory,
        threads: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._rank = rank
        self._batches = iter(batches)
        self._threads = threads
        self._clock = clock
        self._next_check = -math.inf
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="read-ahead")
        self._free = [StagingBuffer(memory), StagingBuffer(memory)]
        self._in_use: StagingBuffer | None = None
        self._closed = threading.Event()
        self._ahead = self._start()

    def __next__(self) -> list[Batch]:
        """Return the next step's micro-batches, and start reading those of the step after it.

        The caller must already have issued every copy that it makes of the previous batches.

        Raises:
            DataError: a row cannot be assembled, or a file of the data has changed.
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
        """End the threads, even if a rank is gone and the device never reads what they wait for."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> _Step | None:
        """Start assembling the next step on the threads; None after the last one."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        buffer, layout = self._free.pop(), batch.layout
        arrays = buffer.claim(layout.rows_per_rank, *self._source.row_shape(batch.stage))
        micro_batches = [
            arrays.part(first, first + layout.micro_size)
            for first in range(0, layout.rows_per_rank, layout.micro_size)
        ]
        # Submitted before the rows, so that the error for damage says what happened to the file.
        checks = [self._pool.submit(self._source.check_unchanged)] if self._check_is_due() else []
        hashes = [
            self._pool.submit(self._assemble, batch, micro_batches, buffer, thread)
            for thread in range(self._threads)
        ]
        return _Step(buffer, micro_batches, checks, hashes)

    def _check_is_due(self) -> bool:
        now = self._clock()
        if now < self._next_check:
            return False
        self._next_check = now + _SECONDS_BETWEEN_CHECKS
        return True

    def _assemble(
        self,
        batch: GlobalBatch,
        micro_batches: Sequence[RowArrays],
        buffer: StagingBuffer,
        thread: int,
    ) -> dict[int, int]:
        """Assemble one thread's part of the step's rows.

        Returns:
            The hash of the rows assembled here, by number of the micro-batch that they belong to.
        """
        if not buffer.wait_until_read(self._closed):
            return {}
        size, num_rows = batch.layout.micro_size, batch.layout.rows_per_rank
        first, end = (num_rows * part // self._threads for part in (thread, thread + 1))
        hashes = {}
        while first < end:
            number, begin = divmod(first, size)
            stop = min(size, begin + end - first)
            rows_B = batch.share(self._rank, number)[begin:stop]
            hashes[number] = self._source.fill(rows_B, micro_batches[number].part(begin, stop))
            first += stop - begin
        return hashes


@dataclass(frozen=True)
class _Step:
    """A step that is being assembled.

    Attributes:
        buffer: the memory it is assembled in.
        micro_batches: parts of the buffer.
        checks: the pending check that the data files are unchanged, if one was due.
        hashes: for each thread, once it is done, the hashes that it adds to those of the
            micro-batches.
    """

    buffer: StagingBuffer
    micro_batches: list[RowArrays]
    checks: list[Future[None]]
    hashes: list[Future[dict[int, int]]]

    def result(self) -> list[Batch]:
        """Wait for the threads; raises what checking and assembling raised."""
        for check in self.checks:
            check.result()
        by_thread = [future.result() for future in self.hashes]
        return [
            Batch.of(rows, sum(hashes.get(number, 0) for hashes in by_thread) % 2**64)
            for number, rows in enumerate(self.micro_batches)
        ]
