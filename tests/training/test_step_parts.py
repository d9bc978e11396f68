"""The parts of a step are timed by the device, which nothing waits for before they are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_bert.training import step
from megatron_bert.training.step_parts import StepParts


class _Event:
    """Stands for a CUDA event; the device passes one every 2 ms."""

    log: list[str]

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self._place: int | None = None

    def record(self) -> None:
        self._place = len(self.log)
        self.log.append("recorded")

    def query(self) -> bool:
        self.log.append("waited")
        return True

    def elapsed_time(self, later: _Event) -> float:
        assert self._place is not None
        assert later._place is not None
        return 2.0 * (later._place - self._place)


def test_on_cuda_events_are_recorded_and_waited_for_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = _Event.log = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    parts = StepParts(torch.device("cuda"))
    parts.end("model")
    parts.end("optimizer")
    # Three, whatever the model: nothing is launched, nothing waits.
    assert log == ["recorded"] * 3
    assert parts.ended.wait(1.0)
    assert log[3:] == ["waited"]
    assert parts.seconds() == {"model_seconds": 2e-3, "optimizer_seconds": 2e-3}


def test_a_steps_numbers_go_to_the_host_unawaited_before_the_moment_that_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[object] = []

    class Numbers:
        def to(self, device: str, *, non_blocking: bool) -> torch.Tensor:
            log.append((device, non_blocking))
            return torch.tensor([2.0, 3.0, 0.0, 1.0, 1.0])

    end = StepParts.end
    monkeypatch.setattr(StepParts, "end", lambda parts, name: (log.append(name), end(parts, name)))
    monkeypatch.setattr(torch, "stack", lambda _: Numbers())
    monkeypatch.setattr(step.dist, "all_reduce", lambda _: None)
    one = torch.ones(())
    topology = SimpleNamespace(device=torch.device("cpu"), speaks_for_its_loss=True)
    model = SimpleNamespace(
        topology=topology,
        runner=SimpleNamespace(train=lambda *_: one),
        sum_shared_gradients=lambda: None,
    )
    update = SimpleNamespace(grad_norm=one, skipped=one, is_finite_here=one)
    optimizer = SimpleNamespace(step=lambda *_: update)
    result = step.take_step(model, optimizer, [], 1, 1e-3)  # type: ignore[arg-type]
    assert log == ["model", ("cpu", True), "optimizer"]
    assert result.read(1.0) == step.StepNumbers(2.0, 3.0, False, (True, True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_reading_a_steps_numbers_does_not_wait_for_what_the_device_was_given_after_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    parts = StepParts(device)
    numbers = torch.tensor([2.0, 3.0, 0.0, 1.0, 1.0], device=device).to("cpu", non_blocking=True)
    parts.end("model")
    torch.cuda._sleep(10**9)  # some tenths of a second
    after = torch.cuda.Event()
    after.record()
    assert step.StepResult(numbers, parts).read(60.0).loss == 2.0
    assert not after.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_work_counts_as_the_part_that_it_was_given_in() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    parts = StepParts(device)
    for _ in range(20):
        matrix = matrix @ matrix
    parts.end("model")
    parts.end("optimizer")
    assert parts.ended.wait(60.0)
    seconds = parts.seconds()
    assert seconds["model_seconds"] > 10 * seconds["optimizer_seconds"] >= 0
