"""How long the parts of a step take, by the clock of the device that computes them."""

from __future__ import annotations

from itertools import pairwise

import torch

from megatron_bert.distributed.device_work import WorkPoint, work_point


class StepParts:
    """Measures parts of a step, each of which begins where the one before it ended.

    On CUDA the device records the time when its work reaches that point; the host does not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._points = [work_point(device, timed=True)]

    def end(self, name: str) -> None:
        """End a part, and begin the next one."""
        self._names.append(name)
        self._points.append(work_point(self._device, timed=True))

    @property
    def ended(self) -> WorkPoint:
        """Where the last part ended."""
        return self._points[-1]

    def seconds(self) -> dict[str, float]:
        """What each part took, as `NAME_seconds`; the device must have finished the last one."""
        pairs = zip(self._names, pairwise(self._points), strict=True)
        return {f"{name}_seconds": begin.seconds_until(end) for name, (begin, end) in pairs}
