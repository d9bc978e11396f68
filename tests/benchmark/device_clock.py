"""A GPU's clock, for tests without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


class DeviceClock:
    """A device whose clock work moves on, and the recording of an event too."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        patch.setattr(torch.cuda, "Event", self._event)
        patch.setattr(torch.cuda, "synchronize", lambda _: None)

    def _event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = self.seconds
            self.seconds += 1e-5

        event.record = record
        event.elapsed_time = lambda later: 1e3 * (later.at - event.at)
        return event
