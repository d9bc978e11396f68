"""Points in a device's work, and waiting for them.

Where a rank is gone, the devices of all others may wait for it without end. A host that slept until
its device woke it would do the same, and name nobody; so it looks from time to time.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Protocol, Self

import torch
import torch.distributed as dist

# Far less than any step takes, and a thread that looks so often takes next to none of a core.
_LOOK_SECONDS = 5e-4


class DeviceStalledError(dist.DistError):
    """A device did not come to the end of its work: what it waits for from other ranks is lost."""


class WorkPoint(Protocol):
    """A point in a device's work: behind all that it was given so far."""

    def wait(
        self, timeout_seconds: float = math.inf, given_up: threading.Event | None = None
    ) -> bool:
        """Wait, in any thread, until the device has come here; not for what it was given after.

        Args:
            timeout_seconds: the longest wait.
            given_up: set where nobody needs it any more.

        Returns:
            Whether the device has come here.
        """
        ...

    def seconds_until(self, later: Self) -> float:
        """By the device's clock; it has come to both points, which are timed."""
        ...


def work_point(device: torch.device, *, timed: bool = False) -> WorkPoint:
    """The point that a device's work has been given up to."""
    return DevicePoint(device, timed=timed) if device.type == "cuda" else HostPoint()


def wait_for_step(end: WorkPoint, timeout_seconds: float) -> None:
    """Wait until the device has come to the end of a step.

    Raises:
        DeviceStalledError: it has not by then.
    """
    if not end.wait(timeout_seconds):
        raise DeviceStalledError(
            f"the device has not ended a step within {timeout_seconds:g} s "
            "(distributed.timeout_seconds); where steps take longer, give a larger number"
        )


class HostPoint:
    """A `WorkPoint` of the CPU, which has done what it was given."""

    def __init__(self) -> None:
        self._now = time.perf_counter()

    def wait(
        self, timeout_seconds: float = math.inf, given_up: threading.Event | None = None
    ) -> bool:
        """Nothing is under way."""
        return True

    def seconds_until(self, later: HostPoint) -> float:
        """By the host's clock."""
        return later._now - self._now


class DevicePoint:
    """A `WorkPoint` of a CUDA device.

    Args:
        device: the device.
        timed: whether the device notes the time when it comes there.
    """

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(
        self, timeout_seconds: float = math.inf, given_up: threading.Event | None = None
    ) -> bool:
        """Look from time to time whether the device has come here."""
        # Any other thread than the first begins at device 0, and would make itself known there.
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
