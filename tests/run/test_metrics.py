from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.errors import RunError, UserError
from megatron_bert.run import directory as run_directory_module
from megatron_bert.run import metrics as metrics_module
from megatron_bert.run.directory import RunDirectory
from megatron_bert.run.metrics import MetricsFile, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def _write(path: Path, *records: Mapping[str, object]) -> None:
    metrics = MetricsFile(path)
    for record in records:
        metrics.write(record)
    metrics.close()


def _steps(path: Path) -> list[int]:
    return [record["step"] for record in read(path)]


def test_each_record_is_on_the_disk_as_one_line_at_once(path: Path) -> None:
    metrics = MetricsFile(path)
    for step in (1, 2):
        metrics.write({"step": step, "corpus": "青空\u2028\n文庫"})
        assert path.read_bytes().count(b"\n") == step
    metrics.truncate_after(2)
    assert read(path) == [{"step": step, "corpus": "青空\u2028\n文庫"} for step in (1, 2)]


@settings(max_examples=50, derandomize=True)
@given(value=st.floats())
def test_every_float_reads_back_to_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    path = tmp_path_factory.mktemp("floats") / "metrics.jsonl"
    _write(path, {"step": 1, "loss": value, "by_corpus": {"a": [value]}})
    (record,) = read(path)
    for back in (record["loss"], record["by_corpus"]["a"][0]):
        assert back == value or math.isnan(back) == math.isnan(value) is True
        assert math.copysign(1, back) == math.copysign(1, value) or math.isnan(value)


def test_what_is_not_finite_stays_valid_json(path: Path) -> None:
    _write(path, {"step": 1, "loss": math.nan, "norm": math.inf, "low": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": "NaN", "norm": "Infinity", "low": "-Infinity"}


def test_lines_after_the_step_are_removed_and_writing_goes_on(path: Path) -> None:
    _write(path, *({"step": step} for step in range(1, 7)))
    before = path.read_text().splitlines()
    metrics = MetricsFile(path)
    metrics.truncate_after(4)
    assert path.read_text().splitlines() == before[:4]
    metrics.write({"step": 5, "again": True})
    metrics.close()
    assert _steps(path) == [1, 2, 3, 4, 5]


def test_lines_that_no_checkpoint_leads_to_stay_under_another_name(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, last in ((1, 5), (2, 3)):
        _write(path, *({"step": step} for step in range(1, last + 1)))
        MetricsFile(path).truncate_after(0, sets_aside=True)
        kept = path.with_name(f"metrics.before-{number}.jsonl")
        assert _steps(kept) == list(range(1, last + 1))
        assert _steps(path) == []
        assert f"has steps up to {last}" in caplog.text
        assert kept.name in caplog.text


def test_nothing_is_set_aside_that_is_not_lost(path: Path) -> None:
    _write(path, {"step": 1}, {"step": 2})
    with path.open("a") as stream:
        stream.write('{"step": 3, "lo')
    MetricsFile(path).truncate_after(2, sets_aside=True)
    assert _steps(path) == [1, 2]
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    metrics = MetricsFile(path)
    with pytest.raises(RunError, match=r"metrics\.jsonl: No space left on device; .*making room"):
        metrics.write({"step": 1})
    # What is left in a buffer is not tried again.
    metrics.close()


def test_a_disk_that_is_full_when_a_job_begins_is_told_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _write(path, {"step": 1}, {"step": 2})
    before = path.read_bytes()
    monkeypatch.setattr(metrics_module, "write_atomically", full)
    monkeypatch.setattr(run_directory_module, "write_atomically", full)
    remedy = "No space left on device; mend that, by making room"
    with pytest.raises(RunError, match=f"cannot write {path}: {remedy}"):
        MetricsFile(path).truncate_after(1)
    assert path.read_bytes() == before
    folder = path.parent / "run"
    refusal = pytest.raises(RunError, match=f"cannot write {folder / 'config.yaml'}: {remedy}")
    with RunDirectory(folder) as run, refusal:
        run.write_config("a: 1\n")


def test_truncating_an_open_file_writes_to_the_new_one(path: Path) -> None:
    metrics = MetricsFile(path)
    metrics.write({"step": 1})
    metrics.write({"step": 2})
    metrics.truncate_after(1)
    metrics.write({"step": 2, "again": True})
    metrics.close()
    assert read(path) == [{"step": 1}, {"step": 2, "again": True}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}', "\ufffd"])
def test_a_torn_last_line_is_removed(path: Path, torn: str) -> None:
    _write(path, {"step": 1})
    with path.open("a", encoding="utf-8") as stream:
        stream.write(torn)
    assert _steps(path) == [1]
    metrics = MetricsFile(path)
    metrics.truncate_after(9)
    metrics.write({"step": 2})
    metrics.close()
    assert _steps(path) == [1, 2]


def test_a_character_cut_in_two_is_a_torn_line(path: Path) -> None:
    _write(path, {"step": 1})
    with path.open("ab") as stream:
        stream.write('{"corpus": "青'.encode()[:-1])
    assert _steps(path) == [1]
    MetricsFile(path).truncate_after(1)
    assert path.read_text() == '{"step": 1}\n'


def test_a_missing_file_needs_no_truncation(path: Path) -> None:
    MetricsFile(path).truncate_after(3)
    assert not path.exists()


def test_reading_names_the_broken_line(path: Path) -> None:
    path.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2: not a record"):
        read(path)


def test_reading_a_missing_file_is_a_users_error(path: Path) -> None:
    with pytest.raises(UserError, match="cannot read metrics"):
        read(path)
