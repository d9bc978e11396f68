from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert import files
from megatron_bert.errors import UserError
from megatron_bert.run import directory
from megatron_bert.run.directory import RunDirectory, check_usable, read_outcome, record_failure
from megatron_bert.run.journal import read_journal

HOLD = (
    "import sys; from pathlib import Path; "
    "from megatron_bert.run.directory import RunDirectory; "
    "run = RunDirectory(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def _names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_failure_takes_the_place_of_what_is_no_record_of_one(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "FAILED").write_text(content)
    record_failure(tmp_path, 1, ValueError("row 7 is bad"))
    assert json.loads((tmp_path / "FAILED").read_text())["reason"] == "row 7 is bad"


def test_a_failure_whose_text_is_no_utf8_is_recorded(tmp_path: Path) -> None:
    record_failure(tmp_path, 0, ValueError("\udc93.bin: cannot read"))
    assert json.loads((tmp_path / "FAILED").read_text())["error"] == "ValueError"


def test_it_makes_the_folder_and_knows_its_paths(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "small"
    with RunDirectory(path) as run:
        assert run.paths.logs == path / "logs"
        assert run.paths.logs.is_dir()
        assert run.paths.metrics == path / "metrics.jsonl"


def test_a_folder_in_which_no_lock_can_be_made_is_refused_and_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directory, "lock_file", refuse)
    with pytest.raises(UserError, match="No space left"):
        RunDirectory(tmp_path / "run")
    assert _names(tmp_path) == set()


def test_the_lock_names_host_process_and_start(tmp_path: Path) -> None:
    with RunDirectory(tmp_path):
        holder = json.loads((tmp_path / "run.lock").read_text())
    assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
    assert "T" in holder["started"]


def test_a_second_live_run_is_refused_with_host_process_and_path(tmp_path: Path) -> None:
    with RunDirectory(tmp_path), pytest.raises(UserError) as caught:
        RunDirectory(tmp_path)
    message = str(caught.value)
    for part in (f"host {socket.gethostname()}", f"process {os.getpid()}", str(tmp_path)):
        assert part in message


def test_the_lock_of_a_run_that_is_just_starting_is_refused_too(tmp_path: Path) -> None:
    with RunDirectory(tmp_path):
        (tmp_path / "run.lock").write_text("")
        with pytest.raises(UserError, match="just starting"):
            RunDirectory(tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {other.pid},"):
            RunDirectory(tmp_path)
        other.send_signal(signal.SIGKILL)
    with RunDirectory(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_closed_run_can_be_opened_again(tmp_path: Path) -> None:
    RunDirectory(tmp_path).close()
    RunDirectory(tmp_path).close()


def test_a_file_in_the_folders_place_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.dir .*file cannot be used"):
        RunDirectory(tmp_path / "file")


@pytest.mark.parametrize("closed", [".", "logs", "run.lock"])
def test_what_may_not_be_written_to_is_told_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    RunDirectory(tmp_path).close()
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path / closed)
    with pytest.raises(UserError, match=r"no permission to write .*Use another run"):
        check_usable(tmp_path)


def test_a_place_that_cannot_be_looked_at_is_a_users_error(tmp_path: Path) -> None:
    for refuse in (RunDirectory, check_usable):
        with pytest.raises(UserError, match=r"cannot be used: .*too long.*Use another"):
            refuse(tmp_path / ("a" * 300))


@pytest.mark.parametrize("end", ["finish", "stop"])
def test_exactly_one_file_tells_how_the_run_ended(tmp_path: Path, end: str) -> None:
    with RunDirectory(tmp_path) as run:
        for first in (run.finish, run.stop):
            first({"reason": "earlier"})
        getattr(run, end)({"reason": "信号", "step": 5})
    name = {"finish": "FINISHED", "stop": "STOPPED"}[end]
    assert _names(tmp_path) == {name, "jobs.jsonl", "logs", "run.lock"}
    assert json.loads((tmp_path / name).read_text()) == {"reason": "信号", "step": 5}


def test_starting_removes_how_an_earlier_job_ended(tmp_path: Path) -> None:
    for name in ("FINISHED", "STOPPED", "FAILED"):
        (tmp_path / name).touch()
    with RunDirectory(tmp_path) as run:
        run.start()
    assert _names(tmp_path) == {"logs", "run.lock"}


def test_the_configuration_is_written_whole(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.write_config("run:\n  seed: 1\n")
        run.write_config("run:\n  seed: 2\n")
    assert (tmp_path / "config.yaml").read_text() == "run:\n  seed: 2\n"
    assert _names(tmp_path) == {"config.yaml", "logs", "run.lock"}


def test_the_first_failure_of_any_rank_is_the_one_recorded(tmp_path: Path) -> None:
    record_failure(tmp_path, 3, ValueError("rows 1 to 4 are bad"))
    record_failure(tmp_path, 0, RuntimeError("connection closed by peer"))
    failure = json.loads((tmp_path / "FAILED").read_text())
    assert (failure["rank"], failure["error"]) == (3, "ValueError")
    assert failure["reason"] == "rows 1 to 4 are bad"
    assert failure["host"] == socket.gethostname()


def _fail_while_another_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Rank 1 has seen no failure and is writing its own when rank 0 records one."""
    own = files.write_durably

    def write(temporary: Path, content: str | bytes) -> None:
        own(temporary, content)
        monkeypatch.setattr(files, "write_durably", own)
        record_failure(path, 0, ValueError("rows 1 to 4 are bad"))

    monkeypatch.setattr(files, "write_durably", write)
    record_failure(path, 1, RuntimeError("connection closed by peer"))
    assert _names(path) == {"FAILED"}
    failure: dict[str, object] = json.loads((path / "FAILED").read_text())
    return failure


def test_of_two_that_fail_at_once_the_one_recorded_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = _fail_while_another_writes(tmp_path, monkeypatch)
    assert (failure["rank"], failure["error"]) == (0, "ValueError")


def test_a_failure_is_recorded_where_files_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    failure = _fail_while_another_writes(tmp_path, monkeypatch)
    assert (failure["rank"], failure["error"]) == (0, "ValueError")


def test_a_failure_without_a_text_is_told_by_its_class(tmp_path: Path) -> None:
    record_failure(tmp_path, 2, AssertionError())
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.kind, outcome.reason) == ("FAILED", "AssertionError")
    with RunDirectory(tmp_path) as run:
        run.start()
    (line,) = read_journal(tmp_path / "jobs.jsonl")
    assert (line["reason"], line["error"]) == ("AssertionError", "AssertionError")
    assert (line["rank"], line["host"]) == (2, socket.gethostname())


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_file_of_an_outcome_that_is_none_of_ours_is_called_so(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "STOPPED").write_text(content)
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.kind, outcome.reason) == ("STOPPED", "STOPPED is no file of this project")


def test_the_details_of_a_failure_stand_apart_from_its_reason(tmp_path: Path) -> None:
    error = ValueError("rank 2 is gone")
    error.add_note("connection closed by peer")
    record_failure(tmp_path, 0, error)
    failure = json.loads((tmp_path / "FAILED").read_text())
    assert failure["reason"] == "rank 2 is gone"
    assert failure["details"] == ["connection closed by peer"]


def test_the_rank_that_failed_first_can_say_more_of_it(tmp_path: Path) -> None:
    record_failure(tmp_path, 3, RuntimeError("connection closed by peer"))
    record_failure(tmp_path, 3, ValueError("rank 2 is gone"))
    failure = json.loads((tmp_path / "FAILED").read_text())
    assert (failure["error"], failure["reason"]) == ("ValueError", "rank 2 is gone")


def test_a_failure_that_cannot_be_recorded_is_logged_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_failure(tmp_path / "gone", 0, ValueError("bad"))
    assert "cannot write" in caplog.text
