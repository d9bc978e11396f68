"""Which ranks keep the others waiting: slow devices, and ranks whose rows come late.

A step takes as long on every rank as on the slowest, since the ranks wait for each other in it. So
each rank measures what it does alone: a small computation, the same everywhere, a few times a
second, and its wait for its own rows. Every so many steps the figures travel with the message that
the ranks exchange for a step.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_bert.distributed.agreement import Ranks

T = TypeVar("T")

# The computation multiplies a square matrix by itself, this many times, at a size that takes well
# below a millisecond on either device.
_SIZE = {"cpu": 192, "cuda": 2048}
_PRODUCTS = {"cpu": 1, "cuda": 4}
_SECONDS_BETWEEN_PROBES = 0.1
# A mean over fewer probes says more about what else ran at that moment than about the rank.
_LEAST_PROBES, _MOST_PROBES = 10, 50
# A rank is slow if it takes more than this many times the median.
_SLOW_DEVICE = 2.0
# With two ranks there is only the other one to compare with, and on a shared machine one of them is
# often behind.
_SLOW_DEVICE_OF_TWO = 4.0
# A rank's rows are late if its wait exceeds the median by this share of a step.
_LATE_ROWS = 0.2

logger = logging.getLogger(__name__)


class DeviceProbe:
    """Times a small computation on this rank's device.

    On CUDA the device records the times itself, in stream order; the host does not wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        size = _SIZE[device.type]
        self._matrix = torch.full((size, size), 0.5, device=device)
        if device.type == "cuda":
            self._matrix = self._matrix.bfloat16()
        self._products = _PRODUCTS[device.type]
        self._result = torch.empty_like(self._matrix)
        self._seconds: deque[float] = deque(maxlen=_MOST_PROBES)
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(
            maxlen=_MOST_PROBES
        )

    @torch.no_grad()
    def run(self) -> None:
        """Compute once."""
        if not self._matrix.is_cuda:
            began = time.perf_counter()
            self._compute()
            self._seconds.append(time.perf_counter() - began)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        self._compute()
        end.record()
        self._under_way.append((begin, end))

    def mean_seconds(self) -> float | None:
        """Mean over the last computations; None while there are too few."""
        while self._under_way:
            begin, end = self._under_way[0]
            if not end.query():  # type: ignore[no-untyped-call]
                break
            self._under_way.popleft()
            self._seconds.append(begin.elapsed_time(end) / 1e3)
        return statistics.fmean(self._seconds) if len(self._seconds) >= _LEAST_PROBES else None

    def _compute(self) -> None:
        for _ in range(self._products):
            torch.mm(self._matrix, self._matrix, out=self._result)


class SlowRankWatch:
    """Measures this rank; the first rank names the slow ones. Construction is collective.

    Args:
        interval: steps between the ranks' figures.
        device: this rank's device.
        clock: monotonic time in seconds.

    Attributes:
        last_wait: seconds that this rank waited for the last step's rows.
    """

    def __init__(
        self, interval: int, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = interval
        self._clock = clock
        self._hosts = Ranks().on_all(socket.gethostname)
        self._probe = DeviceProbe(device)
        self._next_probe = clock()
        self.last_wait = 0.0
        self._waited = 0.0
        self._steps = 0
        self._began = clock()
        self._named: frozenset[tuple[int, str]] = frozenset()

    def timing(self, rows: Iterator[T]) -> Iterator[T]:
        """Yield the steps' rows, and measure the wait for them."""
        while True:
            began = self._clock()
            try:
                batch = next(rows)
            except StopIteration:
                return
            self.last_wait = self._clock() - began
            self._waited += self.last_wait
            yield batch

    def figures(self, step: int) -> list[int] | None:
        """Measure this rank, and return its figures every `interval` steps, otherwise None.

        Returns:
            Means in microseconds: of the last computations (0: not known yet) and, over the steps
            since the previous figures, of the wait for rows and of a whole step.
        """
        now = self._clock()
        if dist.get_world_size() > 1 and now >= self._next_probe:
            self._probe.run()
            self._next_probe = now + _SECONDS_BETWEEN_PROBES
        self._steps += 1
        if step % self._interval or dist.get_world_size() == 1:
            return None
        probe = self._probe.mean_seconds() or 0.0
        means = (probe, self._waited / self._steps, (now - self._began) / self._steps)
        self._waited, self._steps, self._began = 0.0, 0, now
        return [round(1e6 * seconds) for seconds in means]

    def judge(self, step: int, figures: Sequence[Sequence[int]] | None) -> None:
        """Name the ranks that are slow now and were not before, given all ranks' figures."""
        if figures is None or dist.get_rank() != 0:
            return
        slow = {
            **{(rank, "device"): text for rank, text in _slow_devices(figures)},
            **{(rank, "rows"): text for rank, text in _late_rows(figures)},
        }
        for (rank, kind), text in slow.items():
            if (rank, kind) not in self._named:
                logger.warning(
                    "step %s: rank %d (host %s) is slow: %s",
                    f"{step:,}",
                    rank,
                    self._hosts[rank],
                    text,
                )
        self._named = frozenset(slow)


def _slow_devices(figures: Sequence[Sequence[int]]) -> Iterator[tuple[int, str]]:
    known = {rank: probe for rank, (probe, _, _) in enumerate(figures) if probe}
    if not known:
        return
    # The lower median: with two ranks, the faster one.
    usual = statistics.median_low(known.values())
    slow = _SLOW_DEVICE if len(figures) > 2 else _SLOW_DEVICE_OF_TWO
    for rank, probe in known.items():
        if probe > slow * usual:
            yield (
                rank,
                f"a small computation takes {probe / 1e3:.2f} ms there, {usual / 1e3:.2f} ms on "
                f"{_the_usual(figures)}; look for other processes, throttling or a failing device",
            )


def _late_rows(figures: Sequence[Sequence[int]]) -> Iterator[tuple[int, str]]:
    usual = statistics.median_low(waited for _, waited, _ in figures)
    for rank, (_, waited, whole) in enumerate(figures):
        if waited - usual > _LATE_ROWS * whole:
            yield (
                rank,
                f"it waits {waited / 1e3:.1f} ms for the rows of a step of {whole / 1e3:.1f} ms, "
                f"{_the_usual(figures)} {usual / 1e3:.1f} ms; look at its disk, or raise "
                "data.threads",
            )


def _the_usual(figures: Sequence[Sequence[int]]) -> str:
    return "the median rank" if len(figures) > 2 else "the other rank"
