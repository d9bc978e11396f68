"""How long the parts of a step take, by the clock of the device that computes them."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Protocol, Self

import torch

from megatron_bert.distributed.device_work import DevicePoint


class Moment(Protocol):
    """A point in a device's work."""

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until the device has come to it, and for nothing after; whether it has in time."""
        ...

    def seconds_until(self, later: Self) -> float:
        """How much time lies between the two, both of which the device has come to."""
        ...


class HostMoment:
    """Now: the CPU has done what it was given."""

    def __init__(self) -> None:
        self._now = time.perf_counter()

    def wait(self, timeout_seconds: float) -> bool:
        """Nothing is under way."""
        return True

    def seconds_until(self, later: HostMoment) -> float:
        """By the host's clock."""
        return later._now - self._now


def moment(device: torch.device) -> Moment:
    """The point that the device's work has been given up to."""
    return DevicePoint(device, timed=True) if device.type == "cuda" else HostMoment()


class StepParts:
    """Measures parts of a step, each of which begins where the one before it ended.

    On CUDA the device notes the time when its work comes to that point; nothing waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._moments = [moment(device)]

    def end(self, name: str) -> None:
        """End a part, and begin the next one."""
        self._names.append(name)
        self._moments.append(moment(self._device))

    @property
    def ended(self) -> Moment:
        """Where the last part ended."""
        return self._moments[-1]

    def seconds(self) -> dict[str, float]:
        """What each part took, as `NAME_seconds`; the device must have come to the last one."""
        pairs = zip(self._names, pairwise(self._moments), strict=True)
        return {f"{name}_seconds": begin.seconds_until(end) for name, (begin, end) in pairs}
