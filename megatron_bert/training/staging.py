"""Host memory in which batches are assembled on their way to the device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from megatron_bert.data.batch import RowArrays
from megatron_bert.distributed.device_work import HostPoint, WorkPoint, work_point


@dataclass(frozen=True)
class HostMemory:
    """How to allocate host memory, and how to tell that the device has read it.

    Attributes:
        allocate: makes arrays of so many rows, slots and masked slots.
        fence: returns a point after all copies to the device issued so far.
    """

    allocate: Callable[[int, int, int], RowArrays]
    fence: Callable[[], WorkPoint]

    @classmethod
    def for_device(cls, device: torch.device) -> HostMemory:
        """Pinned memory for CUDA, which copies from it while the host goes on; else ordinary."""
        pinned = device.type == "cuda"
        return cls(partial(RowArrays.empty, pin_memory=pinned), partial(work_point, device))


class StagingBuffer:
    """Reusable memory for one step's rows, reallocated when their shape changes.

    One thread claims and releases it; others may write in between.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._arrays: RowArrays | None = None
        self._shape: tuple[int, int, int] | None = None
        self._fence: WorkPoint = HostPoint()

    def claim(self, rows: int, seq_length: int, masked_slots: int) -> RowArrays:
        """Return the memory; write only after `wait_until_read`."""
        shape = (rows, seq_length, masked_slots)
        if self._arrays is None or self._shape != shape:
            # PyTorch's allocator keeps pinned memory until the copies from it are done.
            self._arrays = self._memory.allocate(*shape)
            self._shape, self._fence = shape, HostPoint()
        return self._arrays

    def wait_until_read(self, given_up: threading.Event) -> bool:
        """Wait until the device has copied what the memory held when it was released.

        Args:
            given_up: set once nobody will write there any more, which ends the wait.

        Returns:
            Whether the device has copied it.
        """
        return self._fence.wait(given_up=given_up)

    def release(self) -> None:
        """Give the memory back; its copies must have been issued, but need not be done yet."""
        self._fence = self._memory.fence()
