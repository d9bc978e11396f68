"""Points in a CUDA device's work, and waiting for them.

Where a rank is gone, the devices of all others may wait for it without end. A host that slept until
its device woke it would do the same, and name nobody; so it looks from time to time.
"""

from __future__ import annotations

import math
import threading
import time

import torch
import torch.distributed as dist

# Far less than any step takes, and a thread that looks so often takes next to none of a core.
_LOOK_SECONDS = 5e-4


class DeviceStalledError(dist.DistError):
    """A device did not come to the end of its work: what it waits for from other ranks is lost."""


class DevicePoint:
    """A point in a device's work: behind all that it was given so far.

    Args:
        device: a CUDA device.
        timed: whether the device notes the time when it comes there.
    """

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
        self._event.record()

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
        # Any other thread than the first begins at device 0, and would make itself known there.
        torch.cuda.set_device(self._device)
        deadline = time.monotonic() + timeout_seconds
        while not self._event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() >= deadline or (given_up is not None and given_up.is_set()):
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def seconds_until(self, later: DevicePoint) -> float:
        """By the device's clock; it has come to both points, which are timed."""
        milliseconds: float = self._event.elapsed_time(later._event)
        return milliseconds / 1e3
