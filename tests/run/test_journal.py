"""`jobs.jsonl`: starts, saves and ends of a run's jobs stay there, and the report tells them."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.checkpoint.save_result import SaveResult
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config
from megatron_bert.distributed.launch import process_group
from megatron_bert.report.events import events_of
from megatron_bert.report.records import RunRecords
from megatron_bert.run.directory import RunDirectory, record_failure
from megatron_bert.run.journal import Journal, read_journal
from megatron_bert.run.metrics import cut_torn_line
from megatron_bert.training import job
from megatron_bert.training.stops import STOP_SIGNALS, StopRequests
from tests.report.made_runs import make_run
from tests.training.runs import train

KILLED = "the job ended without a word"


@pytest.fixture
def stops() -> Iterator[StopRequests]:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield StopRequests()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def one_rank() -> AbstractContextManager[None]:
    return process_group(torch.device("cpu"), 60.0)


def told(path: Path) -> list[tuple[str, int]]:
    return [
        (line.get("outcome", line["event"]), line["step"])
        for line in read_journal(path / "jobs.jsonl")
    ]


def _fail_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = job.Trainer.__init__.__globals__["learning_rate"]

    def fail(at: int, config: Config, curriculum: Curriculum) -> float:
        if at == step:
            raise RuntimeError("the cooling failed")
        return float(rate(at, config, curriculum))

    monkeypatch.setattr("megatron_bert.training.trainer.learning_rate", fail)


def test_every_save_and_every_end_of_a_run_that_keeps_one_checkpoint_is_told_in_order(
    tiny_run: Callable[..., Config], stops: StopRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(
        valid=False,
        curriculum=[{"seq_length": 32, "steps": 6}],
        schedule={"warmup_steps": 1},
        checkpoint={"interval": 1, "keep": 1},
    )
    directory = config.run.directory
    signal.raise_signal(signal.SIGTERM)
    job.train(config, stops)
    with RunDirectory(directory) as killed:
        killed.start()
        killed.journal.start(1, 1)
    with one_rank():
        train(config, kill_in=4)
    with monkeypatch.context() as patch:
        _fail_in(5, patch)
        with pytest.raises(RuntimeError, match="the cooling failed"):
            job.train(config, StopRequests())
    ended = [event for event in events_of(RunRecords.read(directory)) if event.kind == "failed"]
    assert [(event.step, event.text) for event in ended] == [(4, "the cooling failed")]
    job.train(config, StopRequests())

    assert told(directory) == [
        ("start", 0), ("save", 1), ("STOPPED", 1),
        ("start", 1), ("save", 2), ("save", 3), ("KILLED", 3),
        ("start", 3), ("save", 4), ("FAILED", 4),
        ("start", 4), ("save", 5), ("save", 6), ("FINISHED", 6),
    ]  # fmt: skip
    events = events_of(RunRecords.read(directory))
    assert [(event.kind, event.step) for event in events] == [
        ("start", 0), ("stage", 1), ("checkpoint", 1), ("stopped", 1),
        ("restart", 1), ("checkpoint", 2), ("checkpoint", 3), ("killed", 3),
        ("restart", 3), ("checkpoint", 4), ("failed", 4),
        ("restart", 4), ("checkpoint", 5), ("checkpoint", 6), ("finished", 6),
    ]  # fmt: skip
    texts = {(event.kind, event.step): event.text for event in events}
    assert texts["stopped", 1] == "signal SIGTERM"
    assert texts["killed", 3] == KILLED
    removed = [
        text.endswith("; removed since")
        for (kind, _), text in texts.items()
        if kind == "checkpoint"
    ]
    assert removed == [True] * 5 + [False]


def test_a_save_is_told_with_its_time_and_size(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs.jsonl")
    journal.save(SaveResult(3, 1.23456, 0.25, 4_000_000))
    journal.save(SaveResult(6, error="no room for \udc93"))
    first, second = read_journal(tmp_path / "jobs.jsonl")
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "event": "save", "step": 3, "seconds": 1.235, "blocked_seconds": 0.25, "bytes": 4_000_000,
    }  # fmt: skip
    assert second == {"event": "save failed", "step": 6, "reason": "no room for \udc93"}


def test_a_start_has_the_jobs_number_ranks_and_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    Journal(tmp_path / "jobs.jsonl").start(5, 4)
    (line,) = read_journal(tmp_path / "jobs.jsonl")
    del line["time"]
    assert line == {"event": "start", "job": "4711", "step": 5, "ranks": 4, "nodes": 2}


def test_half_a_line_of_a_killed_job_is_removed_and_lines_of_an_earlier_version_stay(
    tmp_path: Path,
) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"job": null, "step": 0, "ranks": 1, "nodes": 1}\n{"event": "sa')
    assert told(tmp_path) == [("start", 0)]
    Journal(path).end("FINISHED", {"step": 9})
    assert told(tmp_path) == [("start", 0), ("FINISHED", 9)]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


@pytest.mark.parametrize(
    "foreign",
    [
        '{"note": "moved disk"}',
        '{"step": null}',
        '{"event": null, "step": 1}',
        '{"event": ["save"], "step": 1}',
        '{"event": "moved", "step": 1}',
        '{"event": "start", "job": 7, "step": 1, "ranks": 1, "nodes": 1}',
        '{"event": "start", "job": null, "step": true, "ranks": 1, "nodes": 1}',
        '{"event": "save", "step": 1, "seconds": NaN, "blocked_seconds": 0, "bytes": 1}',
        '{"event": "save", "step": -1, "seconds": 1, "blocked_seconds": 0, "bytes": 1}',
        '{"event": "save failed", "step": 1}',
        '{"event": "end", "step": 1, "outcome": 5}',
        '{"event": "end", "step": 1, "outcome": "FAILED", "reason": 5}',
        "moved disk",
    ],
)
def test_a_line_that_is_none_of_ours_stays_and_is_not_told(
    tmp_path: Path, foreign: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", 30)
    path = run / "jobs.jsonl"
    path.write_text(f"{foreign}\n")
    Journal(path).start(0, 1)
    assert caplog.text == ""
    assert path.read_text().startswith(f"{foreign}\n")
    assert told(run) == [("start", 0)]
    assert [event.kind for event in events_of(RunRecords.read(run))].count("start") == 1


def test_when_a_job_of_an_earlier_version_began_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 30)
    record = {"job": "7", "step": 0, "ranks": 2, "nodes": 1, "began": "2026-01-01T00:00:00+00:00"}
    (run / "jobs.jsonl").write_text(json.dumps(record) + "\n")
    (start,) = (event for event in events_of(RunRecords.read(run)) if event.kind == "start")
    assert start.text.endswith(", 2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize("whole", ["", "a\n", "\n", "a\n\u2028b\n" + "c" * 70_000 + "\n"])
@pytest.mark.parametrize("torn", ["", "d", "d" * 150_000])
def test_only_what_stands_behind_the_last_line_break_is_cut(
    tmp_path: Path, whole: str, torn: str
) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text(whole + torn)
    cut_torn_line(path)
    assert path.read_text() == whole


def test_a_line_that_cannot_be_written_is_missing_and_the_next_one_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, aside = tmp_path / "jobs.jsonl", tmp_path / "aside"
    journal = Journal(path)
    journal.start(0, 1)
    path.rename(aside)
    path.mkdir()
    journal.save(SaveResult(3))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "jobs.jsonl, which lacks a line now: " in caplog.text
    path.rmdir()
    # What a full disk leaves.
    path.write_text(aside.read_text() + '{"event": "save", "st')
    journal.end("FINISHED", {"step": 9})
    assert told(tmp_path) == [("start", 0), ("FINISHED", 9)]


def test_a_run_whose_journal_cannot_be_written_is_trained_all_the_same(
    tiny_run: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_run(valid=False, curriculum=[{"seq_length": 32, "steps": 2}])
    (config.run.directory / "jobs.jsonl").mkdir(parents=True)
    with one_rank():
        assert len(train(config)) == 2
    assert "jobs.jsonl, which lacks a line now" in caplog.text
    assert RunRecords.read(config.run.directory).journal == []


def test_an_end_is_told_once_whoever_takes_the_run_up(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"ste')
    with RunDirectory(tmp_path) as run:
        run.start()
        assert told(tmp_path) == []
        run.journal.start(0, 1)
        # A job script takes it up, then the job.
        run.start()
        run.start()
        assert told(tmp_path) == [("start", 0), ("KILLED", 5)]
        # Two jobs that are refused take no step, but tell why.
        for reason in ("no data", "no tokenizer"):
            record_failure(tmp_path, 0, ValueError(reason))
            run.start()
        run.journal.start(5, 1)
        run.stop({"step": 7, "reason": "run.deadline"})
        run.start()
    lines = read_journal(tmp_path / "jobs.jsonl")
    assert [(line.get("outcome"), line.get("reason")) for line in lines] == [
        (None, None), ("KILLED", KILLED), ("FAILED", "no data"), ("FAILED", "no tokenizer"),
        (None, None), ("STOPPED", "run.deadline"),
    ]  # fmt: skip


def test_a_run_whose_last_line_could_not_be_written_was_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    failures = [OSError(errno.ESTALE, os.strerror(errno.ESTALE))]
    real_open = Path.open

    def open_on_a_bad_day(path: Path, mode: str = "r", **rest: Any) -> Any:
        if failures and mode == "a" and path.name == "jobs.jsonl":
            raise failures.pop()
        return real_open(path, mode, **rest)

    with RunDirectory(tmp_path) as run:
        run.journal.start(0, 1)
        monkeypatch.setattr(Path, "open", open_on_a_bad_day)
        run.finish({"step": 9})
        assert (told(tmp_path), failures) == ([("start", 0)], [])
        assert (tmp_path / "FINISHED").exists()
        # The next job makes up for it.
        run.start()
    assert told(tmp_path) == [("start", 0), ("FINISHED", 9)]


@pytest.mark.parametrize("ends", [True, False])
def test_a_save_that_outlives_its_job_does_not_tell_of_itself_in_the_next_ones_part(
    tmp_path: Path, ends: bool
) -> None:
    with RunDirectory(tmp_path) as first:
        first.journal.start(0, 1)
        if ends:
            first.stop({"step": 3, "reason": "signal SIGTERM"})
            first.journal.save(SaveResult(3, error="given up, because the run ends"))
    with RunDirectory(tmp_path) as second:
        second.start()
        second.journal.start(3, 1)
        first.journal.save(SaveResult(3, error="given up, because the run ends"))
        second.journal.save(SaveResult(6))
    end = ("STOPPED", 3) if ends else ("KILLED", 0)
    assert told(tmp_path) == [("start", 0), end, ("start", 3), ("save", 6)]


def test_two_threads_write_their_lines_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "jobs.jsonl")
    # Of two that write at once both come here; one alone goes on when the other does not come.
    both = threading.Barrier(2)
    met: list[bool] = []

    def fsync(descriptor: int) -> None:
        try:
            both.wait(timeout=0.3)
            met.append(True)
        except threading.BrokenBarrierError:
            met.append(False)

    monkeypatch.setattr(os, "fsync", fsync)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(journal.save, (SaveResult(3), SaveResult(6))))
    assert met == [False, False]
    assert sorted(told(tmp_path)) == [("save", 3), ("save", 6)]
