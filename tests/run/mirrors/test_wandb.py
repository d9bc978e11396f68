"""Metrics in Weights & Biases."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert.config.load import load_config
from megatron_bert.run.mirrors.__main__ import Mirror, end_of_job
from megatron_bert.run.mirrors.following import Bookmark
from tests.run.mirrors.support import copy_metrics, line_of
from tests.run.mirrors.wandb_stand_in import of_kind, read_told, stand_in, tell_again


def _go_online(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("mode: offline", "mode: online"))


def test_wandb_gets_config_curves_by_steps_and_by_tokens_and_marks_of_stages(
    tmp_path: Path, run_dir: Path
) -> None:
    told, _ = tell_again(tmp_path, run_dir, "--follow", "4242")
    (init,) = of_kind("init", told)
    assert init | {"id": ""} == {
        "mode": "offline",
        "id": "",
        "project": "megatron_bert",
        "name": "run",
        "resume": None,
        "layers": 2,
    }
    axes = {values["name"]: values["by"] for values in of_kind("metric", told)}
    assert axes == {
        "step": None,
        "tokens": "step",
        "train/*": "step",
        "valid/*": "step",
        "stage/*": "step",
        "by_tokens/*": "tokens",
    }
    first, second, evaluation = of_kind("log", told)
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
    (settings,) = of_kind("settings", told)
    assert settings["x_stats_pid"] == 4242
    assert not settings["x_disable_stats"]


def test_the_jobs_of_a_run_are_one_run_in_wandb(tmp_path: Path, run_dir: Path) -> None:
    _go_online(run_dir)
    told, _ = tell_again(tmp_path, run_dir)
    assert [values["at"] for values in of_kind("log", told)] == [1, 2, 2]
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write(line_of(3, stage=1, seq_length=64, loss=0.25))
    again, _ = tell_again(tmp_path, run_dir)
    assert of_kind("init", again) == of_kind("init", told)
    assert of_kind("init", told)[0]["resume"] == "allow"
    # The service says what it has.
    assert [values["at"] for values in of_kind("log", again)] == [3]


def test_what_was_kept_offline_is_sent_as_soon_as_a_job_is_online(
    tmp_path: Path, run_dir: Path
) -> None:
    offline, _ = tell_again(tmp_path, run_dir)
    _go_online(run_dir)
    (tmp_path / "told").unlink()
    online, _ = tell_again(tmp_path, run_dir)
    assert of_kind("init", online)[0]["id"] == of_kind("init", offline)[0]["id"]
    assert of_kind("log", online) == of_kind("log", offline)
    assert [values["at"] for values in of_kind("log", online)] == [1, 2, 2]


@pytest.fixture
def mirror_here(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Mirror]:
    """Makes a mirror in this process, of a run that is over."""
    monkeypatch.setenv("TOLD", stand_in(tmp_path)["TOLD"])
    spec = importlib.util.spec_from_file_location("wandb", tmp_path / "stand_in" / "wandb.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    monkeypatch.setitem(sys.modules, "wandb", package)
    name = "megatron_bert.run.mirrors.to_wandb"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
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
    told = read_told(tmp_path)
    expected = [
        {"title": f"run: {title}", "text": text, "level": level} for title, text, level in alerts
    ]
    assert of_kind("alert", told) == expected
    assert of_kind("finish", told) == [{"code": code}]


def test_a_copy_that_is_made_later_alerts_nobody_and_measures_nothing(
    mirror_here: Callable[[], Mirror], tmp_path: Path
) -> None:
    mirror_here().close(None)
    told = read_told(tmp_path)
    assert not of_kind("alert", told)
    (settings,) = of_kind("settings", told)
    assert settings["x_disable_stats"]
    assert "x_stats_pid" not in settings


def test_where_online_is_impossible_the_run_is_kept_offline(tmp_path: Path, run_dir: Path) -> None:
    _go_online(run_dir)
    told, output = tell_again(tmp_path, run_dir, REFUSED="online")
    assert [what for what, _ in told[:4]] == ["settings", "init", "teardown", "init"]
    assert [values["mode"] for values in of_kind("init", told)] == ["online", "offline"]
    assert "the run is kept offline, online is not possible: nobody answers" in output
    assert len(of_kind("log", told)) == 3


def test_wandb_itself_keeps_a_run_offline(run_dir: Path) -> None:
    copy_metrics(run_dir, "wandb")
    (kept,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 0
    bookmark = Bookmark(run_dir / "logs" / "wandb.json")
    assert bookmark.run_id in kept.name
    content = kept.read_bytes()
    assert b"by_tokens/train/loss" in content
    assert b"stage/number" in content
