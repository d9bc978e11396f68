"""Copies of a run's metrics in Weights & Biases and TensorBoard, which never hurt the run."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config, LogConfig
from megatron_bert.locks import lock_file
from megatron_bert.training.metrics import read
from megatron_bert.training.mirrors import processes
from megatron_bert.training.mirrors.following import Bookmark, FollowedFile, scalars
from megatron_bert.training.mirrors.processes import Mirrors
from tests.training.runs import steps_of

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 120.0
EXACT = ("loss", "grad_norm", "batch_hash", "consumed_rows")


def _line(step: int, **values: Any) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def test_a_line_that_is_still_written_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole, torn = _line(1, loss=2.0), _line(2, loss=1.0)
    with FollowedFile(path) as metrics:
        assert list(metrics.new_records()) == []
        path.write_text(whole + torn[:5])
        assert list(metrics.new_records()) == [{"step": 1, "loss": 2.0}]
        with path.open("a") as stream:
            stream.write(torn[5:])
        assert list(metrics.new_records()) == [{"step": 2, "loss": 1.0}]


def test_a_bookmark_lets_every_line_pass_once_over_the_jobs_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "bookmark.json"
    first = [{"step": 1}, {"step": 2}, {"step": 2, "valid_loss": 1.0}, {"step": 3}]
    bookmark = Bookmark(path)
    run_id = bookmark.run_id
    assert Bookmark(path).run_id == run_id, "not kept at once"
    assert all(map(bookmark.is_new, first))
    bookmark.keep()
    # The next job goes on from step 2: line 3 is written again, and another one after it.
    second = Bookmark(path)
    assert second.run_id == run_id
    again = [*first, {"step": 3, "valid_loss": 1.0}, {"step": 4}]
    assert [second.is_new(record) for record in again] == [False] * 4 + [True] * 2
    # The same run directory, but begun anew: another run.
    third = Bookmark(path, anew=True)
    assert third.run_id != run_id
    assert third.is_new({"step": 1})


def test_a_damaged_bookmark_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "bookmark.json"
    path.write_text('{"id": []}')
    assert Bookmark(path).is_new({"step": 1})


def test_a_character_that_is_still_written_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, "to": "猫"}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(line[:-4])
    with FollowedFile(path) as metrics:
        assert list(metrics.new_records()) == []
        path.write_bytes(line)
        assert list(metrics.new_records()) == [{"step": 1, "to": "猫"}]


def test_only_numbers_are_copied() -> None:
    record = {"step": 3, "loss": 2.5, "rows": [1, 2], "batch_hash": "f0", "by": {"ja": 1, "x": "y"}}
    assert scalars(record) == {"step": 3.0, "loss": 2.5, "by/ja": 1.0}


@pytest.fixture
def run_dir(tiny_run: Callable[..., Config]) -> Path:
    """A run's directory with three steps' metrics and wandb switched on."""
    config = tiny_run(log={"wandb": {"mode": "offline"}})
    directory = config.run.directory
    (directory / "logs").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    lines = [_line(step, loss=1.0 / step) for step in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join([*lines, _line(2, valid_loss=0.5)]))
    return directory


def _copy(run_dir: Path, to: str, **environment: str) -> str:
    command = [sys.executable, "-P", "-m", "megatron_bert.training.mirrors", str(run_dir), to]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _events(run_dir: Path) -> list[tuple[int, str, float]]:
    found = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.append((event.step, value.tag, value.tensor.float_val[0]))
    return found


def test_tensorboard_shows_every_line_once(run_dir: Path) -> None:
    _copy(run_dir, "tensorboard")
    expected = [(1, "train/loss", 1.0), (2, "train/loss", 0.5), (2, "valid/loss", 0.5)]
    assert _events(run_dir) == expected
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write(_line(3, loss=0.25))
    _copy(run_dir, "tensorboard")
    assert _events(run_dir) == [*expected, (3, "train/loss", 0.25)]


# Stands for the package: what it is told is written to a file.
STAND_IN = """
import json, os, time

def told(what, **values):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps([what, values]) + "\\n")

class Run:
    def define_metric(self, name, step_metric): told("metric", name=name, by=step_metric)
    def log(self, values):
        if values["step"] == float(os.environ.get("BLOCKS_AT", "-1")):
            time.sleep(1e6)
        told("log", **values)
    def finish(self): told("finish")

class Settings:
    def __init__(self, **keys): pass

def init(*, mode, id, project, name, resume, config, **rest):
    told("init", mode=mode, id=id, project=project, name=name, resume=resume,
         layers=config["model"]["num_layers"])
    if mode == os.environ.get("REFUSED"):
        raise RuntimeError("nobody answers")
    return Run()

def teardown(): told("teardown")
"""


def _stand_in(tmp_path: Path) -> dict[str, str]:
    """Environment in which the stand-in is found and writes to an empty file."""
    folder = tmp_path / "stand_in"
    folder.mkdir(exist_ok=True)
    (folder / "wandb.py").write_text(STAND_IN)
    told = tmp_path / "told"
    told.unlink(missing_ok=True)
    path = os.pathsep.join((str(folder), str(CHECKOUT)))
    return {"PYTHONPATH": path, "TOLD": str(told)}


def _read_told(tmp_path: Path) -> list[Any]:
    return [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


def _told(tmp_path: Path, run_dir: Path, **environment: str) -> tuple[list[Any], str]:
    output = _copy(run_dir, "wandb", **_stand_in(tmp_path), **environment)
    return _read_told(tmp_path), output


def test_the_jobs_of_a_run_are_one_run_in_wandb(tmp_path: Path, run_dir: Path) -> None:
    (init, *rest), _ = _told(tmp_path, run_dir)
    assert init[1] | {"id": ""} == {
        "mode": "offline",
        "id": "",
        "project": "megatron_bert",
        "name": "run",
        "resume": "allow",
        "layers": 2,
    }
    assert rest == [
        ["metric", {"name": "*", "by": "step"}],
        ["log", {"step": 1.0, "loss": 1.0}],
        ["log", {"step": 2.0, "loss": 0.5}],
        ["log", {"step": 2.0, "valid_loss": 0.5}],
        ["finish", {}],
    ]
    (again, *rest), _ = _told(tmp_path, run_dir)
    assert again[1]["id"] == init[1]["id"]
    assert [what for what, _ in rest] == ["metric", "finish"]


def test_where_online_is_impossible_the_run_is_kept_offline(tmp_path: Path, run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text().replace("mode: offline", "mode: online")
    (run_dir / "config.yaml").write_text(config)
    told, output = _told(tmp_path, run_dir, REFUSED="online")
    assert [what for what, _ in told[:3]] == ["init", "teardown", "init"]
    assert [values["mode"] for what, values in told if what == "init"] == ["online", "offline"]
    assert "the run is kept offline, online is not possible: nobody answers" in output
    assert [what for what, _ in told].count("log") == 3


def test_wandb_itself_keeps_a_run_offline(run_dir: Path) -> None:
    _copy(run_dir, "wandb")
    (kept,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 0
    bookmark = Bookmark(run_dir / "logs" / "wandb.json")
    assert bookmark.step == 2
    assert bookmark.run_id in kept.name


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
    assert f"python -P -m megatron_bert.training.mirrors {run_dir} tensorboard" in caplog.text


def test_a_run_that_fails_waits_for_no_copy(run_dir: Path) -> None:
    mirrors = Mirrors()

    def fail() -> None:
        with mirrors:
            mirrors.start(LogConfig(tensorboard=True), run_dir, anew=True)
            raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        fail()
    (process,) = mirrors._processes.values()
    assert process.wait(SECONDS) == 0
    assert len(_events(run_dir)) == 3


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
        command = [sys.executable, "-P", "-m", "megatron_bert.training.mirrors"]
        done = subprocess.run(
            [*command, str(run_dir), "tensorboard"],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert done.returncode == 2
    assert "error: the metrics are being copied already" in done.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "megatron_bert.training.mirrors"]
    done = subprocess.run(
        [*command, str(tmp_path), "tensorboard"],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert f"error: {tmp_path}: is no run directory" in done.stderr


def test_modules_of_the_folder_where_training_starts_are_not_loaded(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "sung"
    (tmp_path / "tensorboard.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with Mirrors() as mirrors:
        mirrors.start(LogConfig(tensorboard=True), run_dir, anew=True)
    assert len(_events(run_dir)) == 3
    assert not canary.exists()


@pytest.fixture
def silent_service() -> Iterator[str]:
    """Address of a service that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _train(config: Config, folder: Path, **environment: str) -> tuple[list[dict[str, Any]], str]:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "pretrain_bert.py"), "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return read(config.run.directory / "metrics.jsonl"), done.stdout + done.stderr


@pytest.mark.faults
def test_a_service_that_never_answers_changes_no_loss_and_delays_no_step(
    tiny_run: Callable[..., Config], tmp_path: Path, silent_service: str
) -> None:
    plain, _ = _train(tiny_run("plain"), tmp_path)
    config = tiny_run("silent", log={"wandb": {"mode": "online"}, "tensorboard": True})
    lines, output = _train(config, tmp_path, WANDB_BASE_URL=silent_service, WANDB_API_KEY="a" * 40)

    def exact(lines: list[dict[str, Any]]) -> dict[int, list[object]]:
        return {step: [line[key] for key in EXACT] for step, line in steps_of(lines).items()}

    def seconds(lines: list[dict[str, Any]]) -> float:
        return sum(line["step_seconds"] for line in steps_of(lines).values())

    assert exact(lines) == exact(plain)
    assert seconds(lines) < seconds(plain) + 5.0
    assert (config.run.directory / "FINISHED").exists()
    assert "wandb may lack lines of metrics.jsonl" in output
    assert len({step for step, *_ in _events(config.run.directory)}) == 12


@pytest.mark.faults
def test_a_service_that_stops_answering_holds_no_step_and_the_rest_is_sent_later(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    plain, _ = _train(tiny_run("plain"), tmp_path)
    config = tiny_run("cut", log={"wandb": {"mode": "online"}})
    lines, output = _train(config, tmp_path, **_stand_in(tmp_path), BLOCKS_AT="5")
    assert [line["loss"] for line in lines if "loss" in line] == [
        line["loss"] for line in plain if "loss" in line
    ]
    assert "python -P -m megatron_bert.training.mirrors" in output
    before = {values["step"] for what, values in _read_told(tmp_path) if what == "log"}
    assert before == {1, 2, 3, 4}
    told, _ = _told(tmp_path, config.run.directory)
    after = {values["step"] for what, values in told if what == "log"}
    # What the bookmark was not moved past before the kill comes again.
    assert before | after == set(range(1, 13))
    assert after >= set(range(5, 13))
