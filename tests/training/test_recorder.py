from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.distributed.device_work import HostPoint
from megatron_bert.run.metrics import MetricsFile, read
from megatron_bert.training import recorder as recorder_module
from megatron_bert.training.divergence import DivergedError
from megatron_bert.training.progress import Progress
from megatron_bert.training.recorder import StepRecorder
from megatron_bert.training.step import Agreement, StepResult
from megatron_bert.training.step_parts import StepParts
from megatron_bert.words import format_duration
from tests.small_model import VOCABULARY, small_config


class _Run:
    """Hands steps to a recorder as the trainer does."""

    def __init__(
        self,
        metrics: Path | None,
        max_skipped: int = 2,
        last_saved: int = 0,
        world_size: int = 1,
        timeout_seconds: float = 1800.0,
    ) -> None:
        config = small_config(
            curriculum=[
                {"seq_length": 32, "steps": 4, "batch": {"global_size": 2}},
                {"seq_length": 64, "steps": 40},
            ],
            optimizer={"max_skipped": max_skipped},
            distributed={"timeout_seconds": timeout_seconds},
        )
        self.curriculum = Curriculum(config)
        file = None if metrics is None else MetricsFile(metrics)
        self.recorder = StepRecorder(
            config,
            self.curriculum,
            VOCABULARY,
            world_size,
            torch.device("cpu"),
            file,
            lambda: last_saved,
        )

    def take(self, step: int, *, skipped: bool = False, loss: float | None = None) -> StepResult:
        norm = math.nan if skipped else 2.0
        parts = StepParts(torch.device("cpu"))
        parts.end("model")
        loss = 0.1 * step if loss is None else loss
        result = StepResult(torch.tensor([loss, norm, skipped, True, not skipped]), parts)
        agreement = Agreement(masked_tokens=9, batch_hash=2**64 - step, stop=False)
        self.recorder.add(step, self.curriculum.at(step), agreement, 1e-3, result, 0.01)
        return result


def test_a_step_is_written_when_the_next_one_is_on_its_way(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run = _Run(path)
    run.take(1)
    assert not path.exists()
    run.take(2)
    assert [line["step"] for line in read(path)] == [1]
    run.recorder.flush()
    run.recorder.flush()
    run.recorder.close()
    assert [line["step"] for line in read(path)] == [1, 2]


def test_a_steps_numbers_are_read_when_that_step_has_ended_whatever_came_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[object] = []

    def wait(moment: HostPoint, timeout_seconds: float) -> bool:
        waited.append(moment)
        return True

    monkeypatch.setattr(HostPoint, "wait", wait)
    run = _Run(tmp_path / "metrics.jsonl")
    first = run.take(1)
    assert waited == []
    second = run.take(2)
    # Whether the second one has ended is not asked while the third one could be on its way.
    assert waited == [first.parts.ended]
    run.recorder.flush()
    run.recorder.close()
    assert waited == [first.parts.ended, second.parts.ended]


@pytest.mark.parametrize(("world_size", "timeout"), [(1, math.inf), (2, 7.0)])
def test_a_device_that_does_not_end_a_step_ends_the_run_where_there_are_other_ranks(
    world_size: int, timeout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float] = []

    def wait(_: HostPoint, timeout_seconds: float) -> bool:
        timeouts.append(timeout_seconds)
        return math.isinf(timeout_seconds)

    monkeypatch.setattr(HostPoint, "wait", wait)
    run = _Run(tmp_path / "metrics.jsonl", world_size=world_size, timeout_seconds=7.0)
    run.take(1)
    if world_size == 1:
        run.take(2)
    else:
        # By name, so that the ranks that are gone are looked for (see `RollCall.explain`).
        with pytest.raises(dist.DistError, match=r"within 7 s \(distributed.timeout_seconds\)"):
            run.take(2)
    run.recorder.close()
    assert timeouts == [timeout]


def test_a_line_has_the_most_memory_that_its_own_step_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the host hands out work: an evaluation's memory is in no step's line.
    peaks = iter([3e9, 5e9, 9e9, 2e9])
    reset: list[object] = []
    run = _Run(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(run.recorder, "_device", torch.device("cuda"))
    monkeypatch.setattr(recorder_module, "work_point", lambda *_, **__: HostPoint())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a chip")
    run.take(1)
    run.take(2)
    run.recorder.flush()
    with run.recorder.paused():
        pass
    run.take(3)
    run.recorder.flush()
    run.recorder.close()
    assert [line["peak_memory_gb"] for line in read(tmp_path / "metrics.jsonl")] == [3, 5, 2]
    assert len(reset) == 4


def test_the_view_is_brought_up_to_date_before_what_is_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    run = _Run(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(Progress, "after_step", lambda _, line, span: told.append(line["step"]))
    monkeypatch.setattr(Progress, "refresh", lambda _: told.append("refresh"))
    run.take(1)
    run.take(2)
    assert told == [1]
    run.recorder.flush()
    run.recorder.close()
    assert told == [1, 2, "refresh"]


def test_time_left_counts_what_the_rows_of_a_stage_compute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    flops = {32: 3.0, 64: 10.0}
    monkeypatch.setattr(
        "megatron_bert.training.recorder.row_flops", lambda _, __, length, ___: flops[length]
    )
    clock = iter((0.0, 60.0, 60.0))
    monkeypatch.setattr(
        "megatron_bert.distributed.device_work.time.perf_counter", lambda: next(clock, 61.0)
    )
    run = _Run(tmp_path / "metrics.jsonl")
    run.take(1)
    run.recorder.flush()
    run.recorder.close()
    # Two rows of 3 a minute: three steps more so, and forty of eight rows of 10, 13 times as much.
    assert "8 h 56 min left, 3 min of the stage" in caplog.messages[0]


def test_a_line_counts_rows_and_tokens_over_all_stages_and_keeps_the_losss_bits(
    tmp_path: Path,
) -> None:
    run = _Run(tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        run.take(step)
    run.recorder.flush()
    run.recorder.close()
    line: dict[str, Any] = read(tmp_path / "metrics.jsonl")[-1]
    assert (line["step"], line["stage"], line["seq_length"]) == (6, 1, 64)
    assert line["consumed_rows"] == 4 * 2 + 2 * 8
    assert line["tokens"] == 4 * 2 * 32 + 2 * 8 * 64
    assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(8 * 64)
    assert line["batch_hash"] == f"{2**64 - 6:016x}"
    # fp32 widened, not rounded: the same bits come back.
    assert line["loss"] == torch.tensor(0.6).item()


def test_what_is_no_step_is_left_out_of_the_steps_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("megatron_bert.distributed.device_work.time.perf_counter", lambda: now)
    run = _Run(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        now += 1.0
        run.take(step)
        with run.recorder.paused():
            now += 60.0 * (step == 2)
    run.recorder.flush()
    run.recorder.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step_seconds"] for line in lines] == [1.0] * 3
    assert all(line["data_seconds"] == 0.01 for line in lines)


def test_an_evaluation_says_after_how_many_tokens_it_was_and_the_last_line_what_was_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = _Run(tmp_path / "metrics.jsonl", last_saved=3)
    run.take(5)
    run.recorder.flush()
    scores: dict[str, object] = {"valid_loss": 2.0, "valid_accuracy": 0.5}
    run.recorder.write_evaluation(5, run.curriculum.at(5), scores)
    run.recorder.close()
    assert caplog.messages[0].endswith("last checkpoint 3")
    assert read(tmp_path / "metrics.jsonl")[-1] == {
        "step": 5, "stage": 1, "tokens": 4 * 2 * 32 + 8 * 64, **scores,
    }  # fmt: skip


@pytest.mark.parametrize("writes", [True, False])
def test_more_skipped_updates_in_a_row_than_allowed_end_the_run_on_every_rank(
    tmp_path: Path, writes: bool
) -> None:
    run = _Run(tmp_path / "metrics.jsonl" if writes else None)
    for step in range(1, 7):
        run.take(step, skipped=step != 3)
    with pytest.raises(DivergedError, match=r"step 6: .*3 steps in a row, 4 to 6"):
        run.recorder.flush()
    run.recorder.close()


def test_lines_of_skipped_steps_and_of_spikes_have_their_rows_and_the_others_have_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _Run(tmp_path / "metrics.jsonl")
    for step in range(1, 41):
        run.take(step, skipped=step == 5, loss=9.0 if step == 30 else 2.0)
    run.recorder.flush()
    run.recorder.close()
    lines = {line["step"]: line for line in read(tmp_path / "metrics.jsonl")}
    assert {step: line["rows"] for step, line in lines.items() if "rows" in line} == {
        5: [8, 15],
        30: [8 + 25 * 8, 15 + 25 * 8],
    }
    assert lines[30]["spike_limit"] == pytest.approx(2.1)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("step 5: loss or gradient is not finite, update skipped")
    assert caplog.messages[1].startswith("step 30: loss 9.0000 is a spike, above 2.1000; rows 208")
    assert "--steps 30:30 --text" in caplog.messages[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45.4, "45 s"), (720, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
