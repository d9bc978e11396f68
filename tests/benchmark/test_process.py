from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.benchmark import process
from megatron_bert.benchmark.process import run_isolated
from megatron_bert.errors import DataError


def cores_when_pinned() -> int:
    process.pin_to_one_core()
    return len(os.sched_getaffinity(0))


def memory_of(megabytes: int) -> tuple[float, float, float, float]:
    before = process.anonymous_megabytes()
    array = np.ones(megabytes * 1_000_000, dtype=np.uint8)
    held = process.anonymous_megabytes() - before
    peak = process.peak_resident_megabytes()
    del array
    return held, peak, process.peak_resident_megabytes(), process.resident_megabytes()


def bytes_written_to(path: Path) -> int:
    before = process.bytes_written()
    path.write_bytes(bytes(1000))
    return process.bytes_written() - before


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(what: str) -> None:
    raise DataError(f"{what} is missing; bring it")


def test_pinning_in_a_process_of_its_own_leaves_this_one_its_cores() -> None:
    cores = os.sched_getaffinity(0)
    assert run_isolated(cores_when_pinned) == 1
    assert os.sched_getaffinity(0) == cores


def test_memory_is_counted_while_it_is_held_and_its_peak_is_kept() -> None:
    held, peak, peak_later, resident_later = run_isolated(memory_of, 200)
    assert 200 <= held < 210
    assert peak > 200
    # The kernel sums its counters up in batches of pages.
    assert peak_later == pytest.approx(peak, abs=5)
    assert resident_later < peak - 190


def test_a_new_process_does_not_begin_with_the_peak_of_its_parent() -> None:
    array = np.ones(300_000_000, dtype=np.uint8)
    assert process.peak_resident_megabytes() > 300
    del array
    assert run_isolated(process.peak_resident_megabytes) < 250


def test_bytes_written_are_counted(tmp_path: Path) -> None:
    assert run_isolated(bytes_written_to, tmp_path / "file") == 1000


def test_an_error_of_the_users_comes_out_of_the_process_as_it_is() -> None:
    with pytest.raises(DataError, match=r"^corpus is missing; bring it$"):
        run_isolated(refuse, "corpus")


def test_a_killed_process_is_told_as_a_want_of_memory() -> None:
    with pytest.raises(DataError, match=r"the process that ran die was killed; .*--quick"):
        run_isolated(die)
