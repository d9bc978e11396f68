"""What is read of a run's metrics, and how often."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bert.run.mirrors.following import Bookmark, FollowedFile, curves
from tests.run.mirrors.support import line_of


def test_a_line_that_is_still_written_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole, torn = line_of(1, loss=2.0), line_of(2, loss=1.0)
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
