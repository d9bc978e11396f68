"""How long the parts of a step take, by the clock of the device that computes them."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Protocol, Self

import torch


class Moment(Protocol):
    """A point in a device's work."""

    def wait(self) -> None:
        """Wait until the device has come to it, and for nothing that it was given after."""
        ...

    def seconds_until(self, later: Self) -> float:
        """How much time lies between the two, both of which the device has come to."""
        ...


class HostMoment:
    """Now: the CPU has done what it was given."""

    def __init__(self) -> None:
        self._now = time.perf_counter()

    def wait(self) -> None:
        """Nothing is under way."""

    def seconds_until(self, later: HostMoment) -> float:
        """By the host's clock."""
        return later._now - self._now


class DeviceMoment:
    """When a CUDA device has done what it was given so far."""

    def __init__(self) -> None:
        # A blocking one: the thread that waits for it leaves its core to others.
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        """Wait for this point of the stream."""
        self._event.synchronize()

    def seconds_until(self, later: DeviceMoment) -> float:
        """By the device's clock."""
        milliseconds: float = self._event.elapsed_time(later._event)
        return milliseconds / 1e3


def moment(device: torch.device) -> Moment:
    """The point that the device's work has been given up to."""
    return DeviceMoment() if device.type == "cuda" else HostMoment()


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
