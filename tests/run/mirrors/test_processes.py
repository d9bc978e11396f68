"""The processes that copy metrics never hurt the run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_bert.config.schema import LogConfig
from megatron_bert.locks import lock_file
from megatron_bert.run.mirrors import processes
from megatron_bert.run.mirrors.processes import Mirrors
from tests.deadlines import DEADLINE_SECONDS
from tests.run.mirrors.support import copy_metrics, losses_and_marks


def test_what_is_not_asked_for_starts_no_process(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with Mirrors() as mirrors:
        mirrors.start(LogConfig(), run_dir, anew=True)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_copy_that_stops_holds_nobody_and_is_told_of(
    run_dir: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(processes, "CLOSE_WITHIN_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING), Mirrors() as mirrors:
        mirrors.start(LogConfig(tensorboard=True), run_dir, anew=True)
        (process,) = mirrors._processes.values()
        process.send_signal(number)
    assert process.returncode == -signal.SIGKILL
    assert "tensorboard may lack lines of metrics.jsonl, which itself is complete" in caplog.text
    assert f"python -P -m megatron_bert.run.mirrors {run_dir} tensorboard" in caplog.text


def test_a_run_that_fails_waits_for_no_copy(run_dir: Path) -> None:
    mirrors = Mirrors()

    def fail() -> None:
        with mirrors:
            mirrors.start(LogConfig(tensorboard=True), run_dir, anew=True)
            raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        fail()
    (process,) = mirrors._processes.values()
    assert process.wait(DEADLINE_SECONDS) == 0
    assert [tag for _, tag, _ in losses_and_marks(run_dir)].count("train/loss") == 2


def test_a_copy_that_cannot_be_started_ends_no_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("no process left")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with caplog.at_level(logging.WARNING), Mirrors() as mirrors:
        mirrors.start(LogConfig(tensorboard=True), run_dir, anew=True)
    assert "did not start (no process left)" in caplog.text


def test_a_second_copy_at_the_same_time_is_refused(run_dir: Path) -> None:
    with lock_file(run_dir / "logs" / "tensorboard.lock"):
        output = copy_metrics(run_dir, "tensorboard", exit_code=2)
    assert "error: the metrics are being copied already" in output


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    output = copy_metrics(tmp_path, "tensorboard", exit_code=2)
    assert f"error: {tmp_path}: is no run directory" in output


def test_a_copy_is_told_which_process_trains(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its parent, when it asks, need not be that any more: the training may have died."""
    commands: list[list[str]] = []

    def refuse(command: list[str], **_: object) -> None:
        commands.append(command)
        raise BlockingIOError

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with Mirrors() as mirrors:
        mirrors.start(LogConfig(tensorboard=True), run_dir, anew=False)
    (command,) = commands
    assert command[command.index("--follow") + 1] == str(os.getpid())


def test_modules_of_the_folder_where_training_starts_are_not_loaded(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "sung"
    (tmp_path / "tensorboard.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with Mirrors() as mirrors:
        mirrors.start(LogConfig(tensorboard=True), run_dir, anew=True)
    assert [tag for _, tag, _ in losses_and_marks(run_dir)].count("train/loss") == 2
    assert not canary.exists()
