"""Profiles of some steps: what is recorded, that it changes nothing, and that it ends no run."""

from __future__ import annotations

import gzip
import json
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_bert.benchmark.step.kernel_shares import profiled_spans
from megatron_bert.config.schema import Config
from megatron_bert.distributed.device_work import DeviceStalledError, HostPoint
from megatron_bert.training import profile as profile_module
from megatron_bert.training.profile import StepProfiler
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train


def _losses(config: Config) -> dict[int, tuple[float, float]]:
    lines = steps_of(train(config))
    return {step: (line["loss"], line["grad_norm"]) for step, line in lines.items()}


def _train_without_profiles(config: Config) -> dict[int, tuple[float, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("megatron_bert.training.profile.OneCycleProfile")
        return _losses(config)


def _events(trace: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return events


def _steps_in(trace: Path) -> list[str]:
    names = (event.get("name", "") for event in _events(trace))
    return [name for name in names if name.startswith("step ")]


def test_a_profiled_run_learns_the_same_and_every_rank_leaves_a_trace_of_the_steps(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    profiled = tiny_run("profiled", profile={"steps": "6:8"})
    losses = run_ranks(2, _losses, profiled)[0]
    assert losses == run_ranks(2, _train_without_profiles, tiny_run("plain"))[0]
    assert not (tmp_path / "plain" / "profile").exists()
    traces = sorted((tmp_path / "profiled" / "profile").iterdir())
    assert [trace.name for trace in traces] == [
        "steps_6_8.rank_0.trace.json.gz",
        "steps_6_8.rank_1.trace.json.gz",
    ]
    for trace in traces:
        assert _steps_in(trace) == ["step 6", "step 7", "step 8"]
    assert "aten::mm" in {event.get("name") for event in _events(traces[0])}


def _train_and_stop(config: Config, stop_after: int) -> None:
    train(config, stop_after=stop_after)


def test_a_job_profiles_those_of_the_steps_that_it_takes(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_run(profile={"steps": "2:5"}, valid=False)
    run_ranks(1, _train_and_stop, config, 3)
    run_ranks(1, _train_and_stop, config, 6)
    run_ranks(1, _losses, config)
    names = sorted(trace.name for trace in (tmp_path / "run" / "profile").iterdir())
    assert names == ["steps_2_3.rank_0.trace.json.gz", "steps_4_5.rank_0.trace.json.gz"]


def _train_on_a_full_disk(config: Config) -> int:
    def cut_off(_: profile, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "export_chrome_trace", cut_off)
        return len(_losses(config))


def test_a_profile_that_cannot_be_written_leaves_nothing_and_the_run_goes_on(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_run(profile={"steps": "2:3"}, valid=False)
    assert run_ranks(1, _train_on_a_full_disk, config)[0] == 12
    assert list((tmp_path / "run" / "profile").iterdir()) == []


def test_a_profiler_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no trace")

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    profiler = StepProfiler(range(1, 2), tmp_path, torch.device("cpu"), taken=0)
    profiler.begin(1)
    profiler.write()
    assert "no trace" in caplog.text
    assert not list(tmp_path.iterdir())


def test_nobody_is_warned_that_a_profile_has_one_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, warned = profile.prepare_trace, list[str]()

    def warn(profiler: profile) -> None:
        # PyTorch 2.11 does so whenever it starts.
        warned.append("Warning: Profiler clears events at the end of each cycle.Only events from")
        warnings.warn(warned[-1], stacklevel=2)
        prepare(profiler)

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(profile, "prepare_trace", warn)
    profiler = StepProfiler(range(1, 2), tmp_path, torch.device("cpu"), taken=0)
    profiler.begin(1)
    profiler.write()
    assert _steps_in(tmp_path / "steps_1_1.rank_0.trace.json.gz") == ["step 1"]
    profiled_spans(lambda: None, ProfilerActivity.CPU, lambda: None)
    assert len(warned) == 2


def test_a_job_behind_the_steps_says_that_it_profiles_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        StepProfiler(range(3, 6), tmp_path, torch.device("cpu"), taken=5)
    assert "begins after step 5" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        StepProfiler(range(3, 6), tmp_path, torch.device("cpu"), taken=4)
        StepProfiler(range(0), tmp_path, torch.device("cpu"), taken=4)
    assert not caplog.text


class _Point(HostPoint):
    """Where the device comes, or never does."""

    def __init__(self, comes: bool) -> None:
        super().__init__()
        self._comes = comes

    def wait(self, timeout_seconds: float = math.inf, given_up: object = None) -> bool:
        return self._comes


def _record_on_cuda(
    folder: Path, patch: pytest.MonkeyPatch, ends: Sequence[bool] = (True, True)
) -> list[str]:
    """Go through a step on a device that is none; return what the memory's recorder was told.

    Args:
        ends: whether it ends the steps before the recorded ones, and those, in time.
    """
    points = chain(ends, repeat(True))
    told: list[str] = []

    def record(enabled: str | None = "all", **_: Any) -> None:
        told.append(f"enabled={enabled}")

    def dump(path: str) -> None:
        told.append("dumped")
        Path(path).write_bytes(b"snapshot")

    patch.setattr(torch.cuda.memory, "_record_memory_history", record)
    patch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    patch.setattr(profile_module, "work_point", lambda _: _Point(next(points)))
    patch.setattr(dist, "get_rank", lambda: 3)
    profiler = StepProfiler(range(1, 3), folder, torch.device("cuda", 0), taken=0)
    with closing(profiler):
        for step in (1, 2, 3):
            profiler.begin(step)
            torch.ones(2, 2) @ torch.ones(2, 2)
            if profiler.is_complete(step):
                profiler.write()
    return told


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_cuda_the_memorys_history_is_written_beside_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = _record_on_cuda(tmp_path, monkeypatch)
    assert told == ["enabled=all", "dumped", "enabled=None"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "steps_1_2.rank_3.memory.pickle",
        "steps_1_2.rank_3.trace.json.gz",
    ]
    assert (tmp_path / "steps_1_2.rank_3.memory.pickle").read_bytes() == b"snapshot"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("ends", [[False], [True, False]])
def test_a_device_that_waits_for_a_lost_rank_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[bool]
) -> None:
    with pytest.raises(DeviceStalledError, match="within inf s"):
        _record_on_cuda(tmp_path, monkeypatch, ends)
    assert not list(tmp_path.iterdir())
    # What is recorded for ever holds every tensor that is made.
    assert not torch._C._autograd._profiler_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_kernels_and_memory_are_in_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    profiler = StepProfiler(range(1, 2), tmp_path, torch.device("cuda", 0), taken=0)
    profiler.begin(1)
    torch.ones(256, 256, device="cuda") @ torch.ones(256, 256, device="cuda")
    profiler.write()
    events = _events(tmp_path / "steps_1_1.rank_0.trace.json.gz")
    assert any(event.get("cat") == "kernel" for event in events)
    assert (tmp_path / "steps_1_1.rank_0.memory.pickle").stat().st_size > 1000
