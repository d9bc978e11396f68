"""Metrics in TensorBoard."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.run.mirrors.__main__ import end_of_job
from megatron_bert.run.mirrors.following import Bookmark
from megatron_bert.run.mirrors.to_tensorboard import TensorBoardMirror
from tests.run.mirrors.support import copy_metrics, line_of, losses_and_marks


def test_tensorboard_shows_every_line_and_every_stage_once(run_dir: Path) -> None:
    copy_metrics(run_dir, "tensorboard")
    expected = [
        (1, "train/loss", 1.0),
        (1, "stage", "stage 1: 32"),
        (2, "train/loss", 0.5),
        (2, "stage", "stage 2: 64"),
        (2, "valid/loss", 0.5),
    ]
    assert losses_and_marks(run_dir) == expected
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write(line_of(3, stage=1, seq_length=64, loss=0.25))
    copy_metrics(run_dir, "tensorboard")
    assert losses_and_marks(run_dir) == [*expected, (3, "train/loss", 0.25)]


def test_tensorboard_says_how_a_job_ended(run_dir: Path, tmp_path: Path) -> None:
    bookmark = Bookmark(tmp_path / "bookmark.json")
    assert bookmark.is_new({"step": 3})
    (run_dir / "STOPPED").write_text('{"reason": "signal SIGTERM"}')
    TensorBoardMirror(run_dir, bookmark).close(end_of_job(run_dir))
    assert losses_and_marks(run_dir) == [(3, "job", "STOPPED: signal SIGTERM")]
