"""The parts of a step are timed by the device, which nothing waits for before they are read."""

from __future__ import annotations

import pytest
import torch

from megatron_bert.training.step_parts import StepParts


class _Event:
    """Stands for a CUDA event; the device passes one every 2 ms."""

    log: list[str]

    def __init__(self, *, enable_timing: bool, blocking: bool) -> None:
        assert enable_timing
        assert blocking
        self._place: int | None = None

    def record(self) -> None:
        self._place = len(self.log)
        self.log.append("recorded")

    def synchronize(self) -> None:
        self.log.append("waited")

    def elapsed_time(self, later: _Event) -> float:
        assert self._place is not None
        assert later._place is not None
        return 2.0 * (later._place - self._place)


def test_on_cuda_events_are_recorded_and_waited_for_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = _Event.log = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    parts = StepParts(torch.device("cuda"))
    parts.end("model")
    parts.end("optimizer")
    # Three, whatever the model: nothing is launched, nothing waits.
    assert log == ["recorded"] * 3
    parts.ended.wait()
    assert log[3:] == ["waited"]
    assert parts.seconds() == {"model_seconds": 2e-3, "optimizer_seconds": 2e-3}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_work_counts_as_the_part_that_it_was_given_in() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    parts = StepParts(device)
    for _ in range(20):
        matrix = matrix @ matrix
    parts.end("model")
    parts.end("optimizer")
    parts.ended.wait()
    seconds = parts.seconds()
    assert seconds["model_seconds"] > 10 * seconds["optimizer_seconds"] >= 0
