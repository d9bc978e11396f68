"""Waiting for a CUDA device, by stand-ins for its events: it may never come to a point."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megatron_bert.distributed.device_work import DevicePoint

GPU = torch.device("cuda", 3)
SOON = 20.0


class _Event:
    """Passed after it was looked at so often; never, where that is None."""

    looks: int | None = 0

    def __init__(self, *, enable_timing: bool) -> None:
        self.enable_timing = enable_timing
        self.left = self.looks

    def record(self) -> None:
        pass

    def query(self) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[object, int]]]:
    """What devices threads were set to."""
    seen: list[tuple[object, int]] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: seen.append((device, threading.get_ident()))
    )
    yield seen
    _Event.looks = 0


def test_a_point_is_waited_for_until_the_device_has_come_there(
    devices: list[tuple[object, int]],
) -> None:
    _Event.looks = 3
    point = DevicePoint(GPU)
    assert point.wait()
    assert point._event.left == -1


def test_the_wait_for_a_device_that_stands_still_ends(devices: list[tuple[object, int]]) -> None:
    _Event.looks = None
    assert not DevicePoint(GPU).wait(timeout_seconds=0.01)


def test_a_wait_is_given_up_from_another_thread_which_knows_its_device(
    devices: list[tuple[object, int]],
) -> None:
    _Event.looks = None
    point, given_up, results = DevicePoint(GPU), threading.Event(), list[bool]()
    thread = threading.Thread(target=lambda: results.append(point.wait(given_up=given_up)))
    thread.start()
    number = thread.ident
    deadline = time.monotonic() + SOON
    while not devices and time.monotonic() < deadline:
        thread.join(0.01)
    given_up.set()
    thread.join(SOON)
    assert results == [False]
    assert devices == [(GPU, number)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_waited_for_and_not_for_what_it_was_given_after() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    first = DevicePoint(device, timed=True)
    torch.cuda._sleep(10**8)  # some hundredths of a second
    second = DevicePoint(device, timed=True)
    torch.cuda._sleep(10**9)
    assert second.wait()
    assert 0.01 < first.seconds_until(second) < 0.5
    last = DevicePoint(device)
    assert not last.wait(timeout_seconds=0.0)
    assert last.wait()
