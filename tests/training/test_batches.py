"""Rows are dealt to ranks, and read ahead by any number of threads into memory used in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch, RowArrays
from megatron_bert.data.source import RowSource, training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError
from megatron_bert.training.batches import SURPLUS_ROW, GlobalBatch, ReadAhead
from megatron_bert.training.staging import HostMemory
from tests.core.support import write_documents
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks
from tests.small_model import small_config
from tests.training.runs import train

CPU = torch.device("cpu")
ROWS = 10


def _global_batch(step: int, ranks: int, micro_size: int) -> GlobalBatch:
    rows = range((step - 1) * ROWS, step * ROWS)
    return GlobalBatch(rows, 0, BatchLayout.divide(ROWS, ranks, micro_size))


def test_a_surplus_row_has_the_number_that_the_extension_knows_it_by() -> None:
    header = Path(__file__).resolve().parents[2] / "csrc" / "batch.h"
    assert f" surplus_row = {SURPLUS_ROW};" in header.read_text(encoding="utf-8")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_size", [1, 2, 3, 10])
def test_ranks_and_micro_batches_of_one_shape_share_out_every_row_once(
    ranks: int, micro_size: int
) -> None:
    part = _global_batch(3, ranks, micro_size)
    shares = [
        part.share(rank, micro_batch).tolist()
        for rank in range(ranks)
        for micro_batch in range(part.layout.num_micro_batches)
    ]
    assert {len(share) for share in shares} == {part.layout.micro_size}
    rows = [row for share in shares for row in share]
    assert sorted(row for row in rows if row != SURPLUS_ROW) == list(range(20, 30))
    assert rows.count(SURPLUS_ROW) == part.layout.surplus_rows


class _Source:
    """Rows of two slots that hold their own number.

    Remembers what was assembled, in turn, notes each row in `events`, and counts checks.
    """

    def __init__(self, events: list[str] | None = None) -> None:
        self.filled: list[int] = []
        self.checks = 0
        self._events = [] if events is None else events

    def row_shape(self, stage: int) -> tuple[int, int]:
        return 2 + stage, 1

    def check_unchanged(self) -> None:
        self.checks += 1

    def fill(self, rows_B: NDArray[np.int64], arrays: RowArrays) -> int:
        self._events += [f"row {row} written" for row in rows_B.tolist()]
        self.filled += rows_B.tolist()
        arrays.tokens_BS[:] = torch.from_numpy(rows_B)[:, None]
        arrays.rows_B[:] = torch.from_numpy(rows_B)
        return int(rows_B.sum())


class _Memory:
    """Stands for pinned memory: counts allocations, and notes in `events` whose copies are done.

    The copies of a step are done when somebody waits for them, and not before.
    """

    def __init__(self, events: list[str] | None = None) -> None:
        self.events = [] if events is None else events
        self.allocated: list[tuple[int, int, int]] = []
        self.fences = 0

    def allocate(self, rows: int, seq_length: int, masked_slots: int) -> RowArrays:
        self.allocated.append((rows, seq_length, masked_slots))
        return RowArrays.empty(rows, seq_length, masked_slots)

    def fence(self) -> Any:
        self.fences += 1
        return _Fence(self, self.fences)

    def host_memory(self) -> HostMemory:
        return HostMemory(self.allocate, self.fence)


class _Fence:
    def __init__(self, memory: _Memory, number: int) -> None:
        self._memory = memory
        self._number = number

    def wait(self, *, given_up: threading.Event) -> bool:
        self._memory.events.append(f"step {self._number} read")
        return True


def _read_ahead(
    source: Any,
    batches: list[GlobalBatch],
    memory: HostMemory | None = None,
    threads: int = 1,
    clock: Callable[[], float] = time.monotonic,
) -> ReadAhead:
    return ReadAhead(source, 0, batches, memory or HostMemory.for_device(CPU), threads, clock)


def test_steps_come_in_turn_each_read_once_and_one_step_ahead() -> None:
    source = _Source()
    batches = [_global_batch(step, 1, 5) for step in range(1, 5)]
    with closing(_read_ahead(source, batches)) as reader:
        for step, micro_batches in enumerate(reader, start=1):
            rows = [micro_batch.rows_B.tolist() for micro_batch in micro_batches]
            first = (step - 1) * ROWS
            assert rows == [list(range(first, first + 5)), list(range(first + 5, first + ROWS))]
            assert [micro_batch.batch_hash for micro_batch in micro_batches] == list(map(sum, rows))
        with pytest.raises(StopIteration):
            next(reader)
    assert source.filled == list(range(4 * ROWS))


def test_the_following_step_is_assembled_without_being_asked_for() -> None:
    last_row_filled = threading.Event()

    class _Watched(_Source):
        def fill(self, rows_B: NDArray[np.int64], arrays: RowArrays) -> int:
            batch_hash = super().fill(rows_B, arrays)
            if 2 * ROWS - 1 in rows_B:
                last_row_filled.set()
            return batch_hash

    source = _Watched()
    batches = [_global_batch(step, 1, 5) for step in range(1, 4)]
    with closing(_read_ahead(source, batches)) as reader:
        next(reader)
        assert last_row_filled.wait(timeout=DEADLINE_SECONDS)
    assert source.filled == list(range(2 * ROWS))


def test_memory_is_allocated_for_two_steps_and_then_used_in_turn() -> None:
    memory = _Memory()
    batches = [_global_batch(step, 1, 5) for step in range(1, 7)]
    with closing(_read_ahead(_Source(), batches, memory.host_memory())) as reader:
        places = [batches_[0].tokens_BS.data_ptr() for batches_ in reader]
    assert memory.allocated == [(ROWS, 2, 1)] * 2
    assert len(set(places)) == 2
    assert places[:2] * 3 == places


def test_memory_is_written_again_only_after_the_device_has_read_it() -> None:
    events: list[str] = []
    memory = _Memory(events)
    batches = [_global_batch(step, 1, 10) for step in range(1, 6)]
    with closing(_read_ahead(_Source(events), batches, memory.host_memory())) as reader:
        next(reader)
        assert memory.fences == 0
        next(reader)  # the copies of step 1 were asked for: its memory is free for step 3
        assert memory.fences == 1
        list(reader)
    written = [[f"row {row} written" for row in batch.rows] for batch in batches]
    assert events == [
        *(*written[0], *written[1]),
        *("step 1 read", *written[2]),
        *("step 2 read", *written[3]),
        *("step 3 read", *written[4]),
    ]


class _Stalled:
    """A point to which the device never comes: it waits for a rank that is gone."""

    def wait(self, *, given_up: threading.Event) -> bool:
        assert given_up.wait(DEADLINE_SECONDS), "nobody gave up"
        return False


def test_reading_ends_also_where_the_device_never_reads_what_was_assembled() -> None:
    source = _Source()
    memory = HostMemory(RowArrays.empty, _Stalled)
    batches = [_global_batch(step, 1, 10) for step in range(1, 6)]
    reader = _read_ahead(source, batches, memory, threads=2)
    next(reader)
    next(reader)
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < DEADLINE_SECONDS / 2
    # Nothing is written over what the device may still read.
    assert sorted(source.filled) == list(range(2 * ROWS))


def test_another_shape_gets_memory_of_its_own_and_waits_for_nothing() -> None:
    memory = _Memory()
    layout = BatchLayout.divide(ROWS, 1, 5)
    batches = [
        GlobalBatch(range(step * ROWS, (step + 1) * ROWS), int(step >= 2), layout)
        for step in range(5)
    ]
    with closing(_read_ahead(_Source(), batches, memory.host_memory())) as reader:
        shapes = [tuple(micro_batches[0].tokens_BS.shape) for micro_batches in reader]
    assert shapes == [(5, 2), (5, 2), (5, 3), (5, 3), (5, 3)]
    assert memory.allocated == [(ROWS, 2, 1)] * 2 + [(ROWS, 3, 1)] * 2
    # Only step 5 is written where another step, the third, had been.
    assert memory.events == ["step 3 read"]


def test_threads_share_a_steps_rows_also_where_micro_batches_have_one_each() -> None:
    class _Meeting(_Source):
        """Nobody goes on before four threads have a row in hand."""

        def __init__(self) -> None:
            super().__init__()
            self._barrier = threading.Barrier(4)

        def fill(self, rows_B: NDArray[np.int64], arrays: RowArrays) -> int:
            self._barrier.wait(timeout=DEADLINE_SECONDS)
            return super().fill(rows_B, arrays)

    batches = [GlobalBatch(range(8), 0, BatchLayout.divide(8, 1, 1))]
    source = _Meeting()
    with closing(_read_ahead(source, batches, threads=4)) as reader:
        (micro_batches,) = reader
    assert [batch.rows_B.tolist() for batch in micro_batches] == [[row] for row in range(8)]
    assert sorted(source.filled) == list(range(8))


def test_files_are_checked_once_a_step_and_at_most_once_a_second() -> None:
    source = _Source()
    seconds = iter([10.0, 10.5, 10.9, 11.0, 11.5, 12.5, 12.6])
    batches = [_global_batch(step, 1, 1) for step in range(1, 8)]
    with closing(_read_ahead(source, batches, threads=3, clock=seconds.__next__)) as reader:
        assert len(list(reader)) == 7
    assert source.checks == 3


def test_a_file_that_changed_ends_the_reading_of_the_step_that_finds_it() -> None:
    class _Changed(_Source):
        def check_unchanged(self) -> None:
            super().check_unchanged()
            if self.checks == 2:
                raise DataError("set.bin: was replaced by another file while in use")

    seconds = iter([0.0, 1.0, 2.0])
    batches = [_global_batch(step, 1, 5) for step in range(1, 4)]
    with closing(_read_ahead(_Changed(), batches, clock=seconds.__next__)) as reader:
        next(reader)
        with pytest.raises(DataError, match="was replaced"):
            next(reader)


def test_an_error_in_a_thread_reaches_the_one_who_asks_for_the_step() -> None:
    class _Damaged(_Source):
        def fill(self, rows_B: NDArray[np.int64], arrays: RowArrays) -> int:
            if 17 in rows_B:
                raise DataError("document 3 holds the token id 600")
            return super().fill(rows_B, arrays)

    batches = [_global_batch(step, 1, 5) for step in range(1, 4)]
    with closing(_read_ahead(_Damaged(), batches, threads=2)) as reader:
        next(reader)
        with pytest.raises(DataError, match="token id 600"):
            next(reader)


def _ends_with_a_data_error(config: Config) -> str:
    with pytest.raises(DataError) as caught:
        train(config)
    return str(caught.value)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_id_that_the_vocabulary_lacks_ends_the_training_as_a_data_error(
    tiny_run: Callable[..., Config], tmp_path: Path, threads: int
) -> None:
    # Among so many documents no sample of them meets this one before its row is assembled.
    documents = [[9]] * 5000
    documents[3] = [600]
    write_documents(tmp_path / "set", documents)
    data = {"train": [{"prefix": str(tmp_path / "set")}], "threads": threads}
    stages = [{"seq_length": 32, "steps": 4, "batch": {"global_size": 125}}]
    config = tiny_run(data=data, curriculum=stages, batch={"micro_size": 125}, valid=False)
    message = run_ranks(1, _ends_with_a_data_error, config)[0]
    assert "document 3 holds the token id 600" in message
    assert "make the dataset anew" in message


@pytest.fixture
def real_config(tmp_path: Path) -> Config:
    """Two stages of one row length, of other sizes and masking rates."""
    random = np.random.default_rng(5)
    write_documents(
        tmp_path / "set", [random.integers(8, 500, size).tolist() for size in range(1, 60)]
    )
    return small_config(
        data={"train": [{"prefix": str(tmp_path / "set")}]},
        curriculum=[
            {"seq_length": 32, "steps": 2, "batch": {"global_size": 7}},
            {"seq_length": 32, "steps": 2, "mlm": {"probability": 0.4}},
        ],
    )


def _contents(source: RowSource, threads: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Stages and copies of all micro-batches, of three ranks: some have surplus rows, or none."""
    batches = [
        GlobalBatch(range(0, 7), 0, BatchLayout.divide(7, 3, 2)),
        GlobalBatch(range(7, 14), 0, BatchLayout.divide(7, 3, 2)),
        GlobalBatch(range(14, 22), 1, BatchLayout.divide(8, 3, 2)),
        GlobalBatch(range(22, 30), 1, BatchLayout.divide(8, 3, 2)),
    ]
    for rank in range(3):
        memory = HostMemory.for_device(device)
        with closing(ReadAhead(source, rank, batches, memory, threads)) as reader:
            for batch, micro_batches in zip(batches, reader, strict=True):
                for micro_batch in micro_batches:
                    on_device = micro_batch.to(device)
                    copies = (tensor.clone() for tensor in on_device.model_inputs())
                    yield batch.stage, Batch.of(RowArrays(*copies), on_device.batch_hash)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_makes_the_batches_that_the_source_makes(
    real_config: Config, tiny_tokenizer: Tokenizer, threads: int
) -> None:
    source = training_source(real_config, tiny_tokenizer)
    total = 0
    for stage, found in _contents(source, threads, CPU):
        expected = source.batch(found.rows_B.numpy(), stage)
        assert found.batch_hash == expected.batch_hash
        for a, b in zip(found.model_inputs(), expected.model_inputs(), strict=True):
            assert torch.equal(a, b)
        total += found.batch_hash
    whole = (source.batch(np.arange(14), 0), source.batch(np.arange(14, 30), 1))
    assert total % 2**64 == sum(batch.batch_hash for batch in whole) % 2**64


@pytest.mark.gpu
def test_what_reaches_the_gpu_through_pinned_memory_is_what_was_assembled(
    real_config: Config, tiny_tokenizer: Tokenizer
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    source = training_source(real_config, tiny_tokenizer)
    gpu = torch.device("cuda", torch.cuda.current_device())
    assert HostMemory.for_device(gpu).allocate(1, 32, 5).tokens_BS.is_pinned()
    # Keeps the GPU busy, so that copies wait while the host assembles ahead.
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]
    found = list(_contents(source, 2, gpu))
    for (_, batch), (_, expected) in zip(found, _contents(source, 1, CPU), strict=True):
        assert batch.batch_hash == expected.batch_hash
        for a, b in zip(batch.model_inputs(), expected.model_inputs(), strict=True):
            assert torch.equal(a.cpu(), b)
