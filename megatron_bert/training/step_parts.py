"""How long the parts of a step take, by the clock of the device that computes them."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Protocol, Self

import torch


class _Moment(Protocol):
    def seconds_until(self, later: Self) -> float:
        """How much time lies between the two, the later of which may have to be waited for."""
        ...


class StepParts:
    """Measures parts of a step, each of which begins where the one before it ended.

    On CUDA the device notes the time when its work comes to that point; nothing waits for it
    before the times are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._moment: type[_HostMoment | _DeviceMoment] = (
            _DeviceMoment if device.type == "cuda" else _HostMoment
        )
        self._names: list[str] = []
        self._moments: list[_Moment] = [self._moment()]

    def end(self, name: str) -> None:
        """End a part, and begin the next one."""
        self._names.append(name)
        self._moments.append(self._moment())

    def seconds(self) -> dict[str, float]:
        """What each part took, as `NAME_seconds`; waits for the device to end the last one."""
        pairs = zip(self._names, pairwise(self._moments), strict=True)
        return {f"{name}_seconds": begin.seconds_until(end) for name, (begin, end) in pairs}


class _HostMoment:
    """Now."""

    def __init__(self) -> None:
        self._now = time.perf_counter()

    def seconds_until(self, later: _HostMoment) -> float:
        return later._now - self._now


class _DeviceMoment:
    """When the device has done what it was given so far."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def seconds_until(self, later: _DeviceMoment) -> float:
        later._event.synchronize()
        milliseconds: float = self._event.elapsed_time(later._event)
        return milliseconds / 1e3
