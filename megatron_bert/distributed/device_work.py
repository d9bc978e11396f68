"""Points in a device's work, and waiting for them.

If a rank is gone, the devices of all others may wait for it forever. A host that slept until its
device woke it would do so too, without naming the lost rank; so the host polls instead.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Protocol, Self

import torch
import torch.distributed as dist

# Far less than any step takes, and a thread that polls this often uses next to none of a core.
_LOOK_SECONDS = 5e-4


class DeviceStalledError(dist.DistError):
    """A device did not finish its work: what it waits for from other ranks is lost."""


class WorkPoint(Protocol):
    """A point in a device's work: after everything that it was given so far."""

    def wait(
        self, timeout_seconds: float = math.inf, given_up: threading.Event | None = None
    ) -> bool:
        """Wait, in any thread, until the device reaches this point; later work is not waited for.

        Args:
            timeout_seconds: the longest wait.
            given_up: set when nobody needs the point any more, which ends the wait.

        Returns:
            Whether the device has reached this point.
        """
        ...

    def seconds_until(self, later: Self) -> float:
        """Seconds to a later point by the device's clock; both are timed and were reached."""
        ...


def work_point(device: torch.device, *, timed: bool = False) -> WorkPoint:
    """The point after all the work that a device has been given so far."""
    return DevicePoint(device, timed=timed) if device.type == "cuda" else HostPoint()


def wait_for_device(device: torch.device) -> None:
    """Wait until a device has done all that it was given, as a CPU always has.

    For measurements: if a rank is gone whose part the device needs, this does not end.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wait_for_step(end: WorkPoint, timeout_seconds: float) -> None:
    """Wait until the device has finished a step.

    Raises:
        DeviceStalledError: it has not finished within the timeout.
    """
    if not end.wait(timeout_seconds):
        raise DeviceStalledError(
            f"the device has not ended a step within {timeout_seconds:g} s "
            "(distributed.timeout_seconds); where steps take longer, give a larger number"
        )


class HostPoint:
    """A `WorkPoint` of the CPU, which has always finished what it was given."""

    def __init__(self) -> None:
        self._now = time.perf_counter()

    def wait(
        self, timeout_seconds: float = math.inf, given_up: threading.Event | None = None
    ) -> bool:
        """Return at once: no work is in flight."""
        return True

    def seconds_until(self, later: HostPoint) -> float:
        """By the host's clock."""
        return later._now - self._now


class DevicePoint:
    """A `WorkPoint` of a CUDA device.

    Args:
        device: the device.
        timed: whether the device records the time when it reaches the point.
    """

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(
        self, timeout_seconds: float = math.inf, given_up: threading.Event | None = None
    ) -> bool:
        """Poll whether the device has reached this point."""
        # Any thread but the first starts on device 0, and would make itself known there.
        torch.cuda.set_device(self._device)
        deadline = time.monotonic() + timeout_seconds
        while not self._event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() >= deadline or (given_up is not None and given_up.is_set()):
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def seconds_until(self, later: DevicePoint) -> float:
        """By the device's clock."""
        milliseconds: float = self._event.elapsed_time(later._event)
        return milliseconds / 1e3
