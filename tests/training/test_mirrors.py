"""Copies of a run's metrics in Weights & Biases and TensorBoard, which never hurt the run."""

from __future__ import annotations

import importlib.util
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

from megatron_bert.config.load import dump_config, load_config
from megatron_bert.config.schema import Config, LogConfig
from megatron_bert.locks import lock_file
from megatron_bert.training.metrics import read
from megatron_bert.training.mirrors import processes
from megatron_bert.training.mirrors.__main__ import Mirror, end_of_job
from megatron_bert.training.mirrors.following import Bookmark, FollowedFile, curves
from megatron_bert.training.mirrors.processes import Mirrors
from megatron_bert.training.mirrors.to_tensorboard import TensorBoardMirror
from tests.training.runs import steps_of

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 120.0
TO_WANDB = "megatron_bert.training.mirrors.to_wandb"
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


def test_only_numbers_are_copied_under_the_names_of_their_groups() -> None:
    record = {"step": 3, "loss": 2.5, "rows": [1, 2], "batch_hash": "f0", "skipped": False}
    assert curves(record) == {"train/loss": 2.5, "train/skipped": 0.0}
    record = {"step": 3, "valid_loss": 2.5, "valid": {"ja": {"loss": 2, "to": "y"}}}
    assert curves(record) == {"valid/loss": 2.5, "valid/ja/loss": 2.0}


@pytest.fixture
def run_dir(tiny_run: Callable[..., Config]) -> Path:
    """A run's directory with three steps' metrics and wandb switched on."""
    config = tiny_run(log={"wandb": {"mode": "offline"}})
    directory = config.run.directory
    (directory / "logs").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    (directory / "metrics.jsonl").write_text(
        _line(1, stage=0, seq_length=32, tokens=64, loss=1.0)
        + _line(2, stage=1, seq_length=64, tokens=128, loss=0.5)
        + _line(2, stage=1, tokens=128, valid_loss=0.5)
    )
    return directory


def _copy(run_dir: Path, to: str, *options: str, **environment: str) -> str:
    """Copy; with `--follow` as beside a training that has ended already."""
    command = [sys.executable, "-P", "-m", "megatron_bert.training.mirrors", str(run_dir), to]
    done = subprocess.run(
        [*command, *options],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _events(run_dir: Path) -> list[tuple[int, str, Any]]:
    """Step, name and value of each loss, stage and end of a job."""
    found: list[tuple[int, str, Any]] = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in ("stage", "job"):
                    found.append((event.step, value.tag, value.tensor.string_val[0].decode()))
                elif value.tag.endswith("/loss"):
                    found.append((event.step, value.tag, value.tensor.float_val[0]))
    return found


def test_tensorboard_shows_every_line_and_every_stage_once(run_dir: Path) -> None:
    _copy(run_dir, "tensorboard")
    expected = [
        (1, "train/loss", 1.0),
        (1, "stage", "stage 1: 32"),
        (2, "train/loss", 0.5),
        (2, "stage", "stage 2: 64"),
        (2, "valid/loss", 0.5),
    ]
    assert _events(run_dir) == expected
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write(_line(3, stage=1, seq_length=64, loss=0.25))
    _copy(run_dir, "tensorboard")
    assert _events(run_dir) == [*expected, (3, "train/loss", 0.25)]


def test_tensorboard_says_how_a_job_ended(run_dir: Path, tmp_path: Path) -> None:
    bookmark = Bookmark(tmp_path / "bookmark.json")
    assert bookmark.is_new({"step": 3})
    (run_dir / "STOPPED").write_text('{"reason": "signal SIGTERM"}')
    TensorBoardMirror(run_dir, bookmark).close(end_of_job(run_dir))
    assert _events(run_dir) == [(3, "job", "STOPPED: signal SIGTERM")]


# Stands for the package: what it is told is written to a file.
STAND_IN = """
import json, os, time

def told(what, **values):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps([what, values]) + "\\n")

class Run:
    def __init__(self, starting_step): self.starting_step = starting_step
    def define_metric(self, name, step_metric=None): told("metric", name=name, by=step_metric)
    def log(self, values, step):
        if step == int(os.environ.get("BLOCKS_AT", "-1")):
            time.sleep(1e6)
        told("log", at=step, **values)
    def alert(self, title, text, level): told("alert", title=title, text=text, level=level)
    def finish(self, exit_code): told("finish", code=exit_code)

class Settings:
    def __init__(self, **keys):
        stats = {key: value for key, value in keys.items() if "stats" in key}
        told("settings", parent=os.getppid(), **stats)

def init(*, mode, id, project, name, resume, config, **rest):
    told("init", mode=mode, id=id, project=project, name=name, resume=resume,
         layers=config["model"]["num_layers"])
    if mode == os.environ.get("REFUSED"):
        raise RuntimeError("nobody answers")
    # What the service has.
    with open(os.environ["TOLD"]) as file:
        steps = [values["at"] for what, values in map(json.loads, file) if what == "log"]
    return Run(max(steps, default=-1) + 1 if mode == "online" else 0)

def teardown(): told("teardown")
"""


def _stand_in(tmp_path: Path) -> dict[str, str]:
    """Environment in which the stand-in is found and writes to a file."""
    folder = tmp_path / "stand_in"
    folder.mkdir(exist_ok=True)
    (folder / "wandb.py").write_text(STAND_IN)
    path = os.pathsep.join((str(folder), str(CHECKOUT)))
    return {"PYTHONPATH": path, "TOLD": str(tmp_path / "told")}


def _read_told(tmp_path: Path) -> list[Any]:
    return [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


def _told(
    tmp_path: Path, run_dir: Path, *options: str, **environment: str
) -> tuple[list[Any], str]:
    """What wandb was told in one more copy, and what the copy printed."""
    before = len(_read_told(tmp_path)) if (tmp_path / "told").exists() else 0
    output = _copy(run_dir, "wandb", *options, **_stand_in(tmp_path), **environment)
    return _read_told(tmp_path)[before:], output


def _of(kind: str, told: list[Any]) -> list[Any]:
    return [values for what, values in told if what == kind]


def _go_online(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("mode: offline", "mode: online"))


def test_wandb_gets_config_curves_by_steps_and_by_tokens_and_marks_of_stages(
    tmp_path: Path, run_dir: Path
) -> None:
    told, _ = _told(tmp_path, run_dir, "--follow")
    (init,) = _of("init", told)
    assert init | {"id": ""} == {
        "mode": "offline",
        "id": "",
        "project": "megatron_bert",
        "name": "run",
        "resume": None,
        "layers": 2,
    }
    axes = {values["name"]: values["by"] for values in _of("metric", told)}
    assert axes == {
        "step": None,
        "tokens": "step",
        "train/*": "step",
        "valid/*": "step",
        "stage/*": "step",
        "by_tokens/*": "tokens",
    }
    first, second, evaluation = _of("log", told)
    assert first == {
        "at": 1,
        "step": 1,
        "tokens": 64,
        "train/loss": 1.0,
        "train/stage": 0.0,
        "train/seq_length": 32.0,
        "train/tokens": 64.0,
        "by_tokens/train/loss": 1.0,
        "stage/number": 1,
        "stage/seq_length": 32,
    }
    assert (second["stage/number"], second["stage/seq_length"]) == (2, 64)
    assert evaluation["by_tokens/valid/loss"] == evaluation["valid/loss"] == 0.5
    assert "stage/number" not in evaluation
    # What the training uses of the machine, not this process.
    (settings,) = _of("settings", told)
    assert settings["x_stats_pid"] == settings["parent"]
    assert not settings["x_disable_stats"]


def test_the_jobs_of_a_run_are_one_run_in_wandb(tmp_path: Path, run_dir: Path) -> None:
    _go_online(run_dir)
    told, _ = _told(tmp_path, run_dir)
    assert [values["at"] for values in _of("log", told)] == [1, 2, 2]
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write(_line(3, stage=1, seq_length=64, loss=0.25))
    again, _ = _told(tmp_path, run_dir)
    assert _of("init", again) == _of("init", told)
    assert _of("init", told)[0]["resume"] == "allow"
    # The service says what it has.
    assert [values["at"] for values in _of("log", again)] == [3]


def test_what_was_kept_offline_is_sent_as_soon_as_a_job_is_online(
    tmp_path: Path, run_dir: Path
) -> None:
    offline, _ = _told(tmp_path, run_dir)
    _go_online(run_dir)
    (tmp_path / "told").unlink()
    online, _ = _told(tmp_path, run_dir)
    assert _of("init", online)[0]["id"] == _of("init", offline)[0]["id"]
    assert _of("log", online) == _of("log", offline)
    assert [values["at"] for values in _of("log", online)] == [1, 2, 2]


@pytest.fixture
def mirror_here(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Mirror]:
    """Makes a mirror in this process, of a run that is over."""
    monkeypatch.setenv("TOLD", _stand_in(tmp_path)["TOLD"])
    spec = importlib.util.spec_from_file_location("wandb", tmp_path / "stand_in" / "wandb.py")
    assert spec is not None
    assert spec.loader is not None
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.delitem(sys.modules, TO_WANDB, raising=False)
    module = importlib.import_module(TO_WANDB)
    monkeypatch.delitem(sys.modules, TO_WANDB)
    config = load_config(run_dir / "config.yaml")
    bookmark = Bookmark(tmp_path / "bookmark.json")
    return lambda: module.WandbMirror(config, run_dir, bookmark, None)


@pytest.mark.parametrize(
    ("left", "alerts", "code"),
    [
        ("FINISHED", [], 0),
        ("STOPPED", [("STOPPED after step 2,000", "why", "INFO")], 0),
        ("FAILED", [("FAILED after step 2,000", "why", "ERROR")], 1),
        (None, [("KILLED after step 2,000", "the job ended without a word", "ERROR")], 1),
    ],
)
def test_wandb_alerts_those_concerned_of_a_job_that_did_not_finish(
    mirror_here: Callable[[], Mirror],
    tmp_path: Path,
    run_dir: Path,
    left: str | None,
    alerts: list[tuple[str, ...]],
    code: int,
) -> None:
    if left is not None:
        (run_dir / left).write_text('{"reason": "why"}')
    mirror = mirror_here()
    mirror.write({"step": 2000, "stage": 0, "loss": 1.0}, begins_stage=False)
    mirror.close(end_of_job(run_dir))
    told = _read_told(tmp_path)
    expected = [
        {"title": f"run: {title}", "text": text, "level": level} for title, text, level in alerts
    ]
    assert _of("alert", told) == expected
    assert _of("finish", told) == [{"code": code}]


def test_a_copy_that_is_made_later_alerts_nobody_and_measures_nothing(
    mirror_here: Callable[[], Mirror], tmp_path: Path
) -> None:
    mirror_here().close(None)
    told = _read_told(tmp_path)
    assert not _of("alert", told)
    (settings,) = _of("settings", told)
    assert settings["x_disable_stats"]
    assert "x_stats_pid" not in settings


def test_what_is_not_asked_for_starts_no_process(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with Mirrors() as mirrors:
        mirrors.start(LogConfig(), run_dir, anew=True)


def test_where_online_is_impossible_the_run_is_kept_offline(tmp_path: Path, run_dir: Path) -> None:
    _go_online(run_dir)
    told, output = _told(tmp_path, run_dir, REFUSED="online")
    assert [what for what, _ in told[:4]] == ["settings", "init", "teardown", "init"]
    assert [values["mode"] for values in _of("init", told)] == ["online", "offline"]
    assert "the run is kept offline, online is not possible: nobody answers" in output
    assert len(_of("log", told)) == 3


def test_wandb_itself_keeps_a_run_offline(run_dir: Path) -> None:
    _copy(run_dir, "wandb")
    (kept,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 0
    bookmark = Bookmark(run_dir / "logs" / "wandb.json")
    assert bookmark.run_id in kept.name
    content = kept.read_bytes()
    assert b"by_tokens/train/loss" in content
    assert b"stage/number" in content


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
    assert [tag for _, tag, _ in _events(run_dir)].count("train/loss") == 2


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
    assert [tag for _, tag, _ in _events(run_dir)].count("train/loss") == 2
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
    assert {step for step, *_ in _events(config.run.directory)} == set(range(1, 13))


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
    before = {values["at"] for values in _of("log", _read_told(tmp_path))}
    assert before == {1, 2, 3, 4}
    told, _ = _told(tmp_path, config.run.directory)
    assert {values["at"] for values in _of("log", told)} == set(range(5, 13))
