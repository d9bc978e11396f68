from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch
from megatron_bert.training import slow_ranks
from megatron_bert.training.batches import ReadAhead
from megatron_bert.training.slow_ranks import DeviceProbe, SlowRankWatch
from megatron_bert.training.step import agree
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology
from tests.training.runs import train

CPU = torch.device("cpu")


class _Clock:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _names_of(steps: int, waits: dict[int, float], probes: dict[int, float]) -> list[str]:
    """Take steps of a second, with such a wait for rows and such a computation on some ranks."""
    rank, clock, log = dist.get_rank(), _Clock(), _Log()
    slow_ranks.logger.addHandler(log)

    class _Probe(DeviceProbe):
        def mean_seconds(self) -> float | None:
            return probes.get(rank, 1e-3)

    def rows() -> Iterator[list[Batch]]:
        for _ in range(steps):
            clock.now += waits.get(rank, 0.01)
            yield []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow_ranks, "DeviceProbe", _Probe)
        watch = SlowRankWatch(5, CPU, clock)
        topology = cpu_topology()
        for step, batch in enumerate(watch.timing(rows()), start=1):
            agreement = agree(batch, False, topology, watch.figures(step))
            assert (agreement.figures is None) == (step % 5 != 0)
            watch.judge(step, agreement.figures)
            clock.now += 1.0 - waits.get(rank, 0.01)
    slow_ranks.logger.removeHandler(log)
    return log.messages


def test_ranks_of_one_speed_are_not_named() -> None:
    assert run_ranks(3, _names_of, 20, {}, {1: 1.9e-3}) == [[], [], []]


def test_of_two_ranks_only_one_that_is_far_behind_is_named() -> None:
    assert run_ranks(2, _names_of, 20, {}, {1: 3.9e-3}) == [[], []]
    (message,), _ = run_ranks(2, _names_of, 20, {}, {1: 4.1e-3})
    assert "4.10 ms there, 1.00 ms on the other rank" in message


@pytest.mark.parametrize("world_size", [3, 4])
def test_a_slow_device_is_named_once_by_the_first_rank(world_size: int) -> None:
    named, *others = run_ranks(world_size, _names_of, 20, {}, {1: 2.1e-3})
    assert others == [[]] * (world_size - 1)
    (message,) = named
    assert re.match(r"step 5: rank 1 \(host .*\) is slow: a small computation takes 2.10", message)
    assert "1.00 ms on the median rank" in message


def test_a_rank_that_waits_for_its_rows_is_named() -> None:
    named, _, _ = run_ranks(3, _names_of, 20, {0: 0.5}, {})
    (message,) = named
    assert re.match(r"step 5: rank 0 .* waits 500\.0 ms for the rows of a step", message)
    assert "data.threads" in message


def test_the_computation_is_timed_once_there_are_enough_of_them() -> None:
    probe = DeviceProbe(CPU)
    for _ in range(9):
        probe.run()
        assert probe.mean_seconds() is None
    probe.run()
    mean = probe.mean_seconds()
    assert mean is not None
    assert 0.0 < mean < 10.0


def _train_with_late_rows(config: Config) -> list[str]:
    """Rank 1 gets its rows late; the clock that waits are measured by moves only there."""
    clock, log = _Clock(), _Log()
    slow_ranks.logger.addHandler(log)
    own = ReadAhead.__next__

    def late(self: ReadAhead) -> list[Batch]:
        clock.now += 1.0 if dist.get_rank() == 1 else 0.01
        return own(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadAhead, "__next__", late)
        patch.setattr(slow_ranks.SlowRankWatch.__init__, "__defaults__", (clock,))
        train(config)
    slow_ranks.logger.removeHandler(log)
    return log.messages


def test_a_run_names_the_rank_whose_rows_come_late(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    named, other = run_ranks(2, _train_with_late_rows, tiny_run(log={"interval": 4}))
    assert other == []
    (message,) = named
    assert message.startswith("step 4: rank 1 (host ")
