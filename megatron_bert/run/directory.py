"""The folder of one run: its lock, its configuration, and how the run ended."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bert.closeable import Closeable
from megatron_bert.config.run_paths import RunPaths
from megatron_bert.errors import RunError, UserError, details_of
from megatron_bert.files import sync_to_disk, write_atomically, write_if_absent
from megatron_bert.locks import (
    FileInUseError,
    describe_holder,
    holder_lives,
    lock_file,
    remove_lock,
)
from megatron_bert.run import metrics
from megatron_bert.run.journal import END, Journal, read_journal

FINISHED, STOPPED, FAILED = "FINISHED", "STOPPED", "FAILED"
# Fields of a line in the journal that are not facts of the outcome.
_OF_EVENTS = ("event", "time", "outcome")
# Fields that `FAILED` holds besides the reason, and that `jobs.jsonl` keeps.
_FAILURE = ("error", "rank", "host")

logger = logging.getLogger(__name__)


class RunDirectory(Closeable):
    """A run's folder, made if need be and locked against a second live run.

    Only the first rank creates an instance. The lock belongs to the process: it ends with `close`
    or with the process, however that dies, so a stale `run.lock` does no harm.

    Args:
        path: The folder (`run.dir`).

    Raises:
        UserError: The folder cannot be made or locked, or another live run holds it (the message
            names its host and process).

    Attributes:
        paths: The paths in it; the folder of logs exists.
        journal: The record of what its jobs did.
    """

    def __init__(self, path: Path) -> None:
        self.paths = RunPaths(path)
        self.journal = Journal(self.paths.journal)
        self._is_new = False
        try:
            self._is_new = not path.exists()
            self.paths.logs.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.paths.lock)
        except FileInUseError as error:
            raise _in_use(path, str(error)) from error
        except OSError as error:
            self._remove_what_was_made()
            raise _unusable(path, str(error)) from error

    def _remove_what_was_made(self) -> None:
        """Leave no folder behind that could be made, but not locked (on a full disk, say)."""
        if self._is_new:
            with suppress(OSError):
                self.paths.logs.rmdir()
                self.paths.root.rmdir()

    def close(self) -> None:
        """Release the folder for another run; an abandoned save no longer writes to the journal."""
        self.journal.close()
        self._lock.close()

    def remove_if_new(self) -> None:
        """Remove the folder if it was made here and holds nothing but how its job was refused.

        So a command with a mistake leaves nothing behind, and the corrected one begins anew. Only a
        job of one rank can do this, since other ranks may be writing there.
        """
        with suppress(OSError):
            paths, failed = self.paths, self.paths.root / FAILED
            if self._is_new and set(paths.root.iterdir()) <= {paths.logs, paths.lock, failed}:
                paths.logs.rmdir()
                failed.unlink(missing_ok=True)
                remove_lock(paths.lock, self._lock)
                paths.root.rmdir()

    def start(self) -> None:
        """Remove the outcome of an earlier job of the run (see `forget_outcome`)."""
        forget_outcome(self.paths.root)

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, YAML, to `config.yaml`.

        Raises:
            RunError: The host could not write.
        """
        path = self.paths.config
        try:
            write_atomically(path, text)
        except OSError as error:
            raise RunError(
                f"cannot write {path}: {error.strerror}; mend that, by making room if the disk is "
                "full, and give the same command again"
            ) from error

    def finish(self, reason: Mapping[str, object]) -> None:
        """Leave `FINISHED`: all steps are taken."""
        self._end(FINISHED, reason)

    def stop(self, reason: Mapping[str, object]) -> None:
        """Leave `STOPPED`: a signal or the deadline ended the job; the next one goes on."""
        self._end(STOPPED, reason)

    def _end(self, name: str, reason: Mapping[str, object]) -> None:
        text = _as_text(reason)
        self.journal.end(name, dict(reason))
        # Not `forget_outcome`: if that line was not written, it would record this job as killed.
        _remove_outcome_files(self.paths.root)
        write_atomically(self.paths.root / name, text)


def check_usable(path: Path) -> None:
    """Refuse what `RunDirectory` would refuse, without making anything.

    Raises:
        UserError: the folder cannot be made or written to, or a live run of this host holds it.
    """
    paths = RunPaths(path)
    try:
        for folder in (path, paths.logs):
            _check_folder(path, folder)
        if paths.lock.exists() and not os.access(paths.lock, os.W_OK):
            raise _unusable(path, f"no permission to write {paths.lock}")
    except OSError as error:
        raise _unusable(path, str(error)) from error
    # A process may outlive its run; a run that is still going on has no outcome.
    if holder_lives(paths.lock) and read_outcome(path) is None:
        raise _in_use(path, describe_holder(paths.lock))


def _check_folder(path: Path, folder: Path) -> None:
    """Refuse a run directory where one of its folders can be neither made nor written to."""
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    if not folder.is_dir():
        raise _unusable(path, f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(path, f"no permission to write in {folder}")


def _in_use(path: Path, holder: str) -> UserError:
    return UserError(
        f"run.dir {path} is in use by a live run ({holder}). End that run first, or use another "
        "run.dir"
    )


def _unusable(path: Path, problem: str) -> UserError:
    return UserError(f"run.dir {path} cannot be used: {problem}. Use another run.dir")


@dataclass(frozen=True)
class Outcome:
    """How the last job of a run ended, as it left it in the run directory.

    Attributes:
        kind: `FINISHED`, `STOPPED`, `FAILED` or `KILLED`.
        reason: in words; empty where there is none to tell.
        needs_person: whether it fails again until a person has fixed configuration, data or place.
        failure: for a failure, what else is known: the `error`'s class, its `rank` and `host`.
    """

    kind: str
    reason: str
    needs_person: bool = False
    failure: Mapping[str, object] = field(default_factory=dict)


KILLED = Outcome("KILLED", "the job ended without a word")
"""The outcome of a job that has ended without leaving one."""


def read_outcome(path: Path) -> Outcome | None:
    """Return how the last job of the run directory `path` ended; None: it runs, or was killed."""
    for kind in (FINISHED, STOPPED, FAILED):
        try:
            text = (path / kind).read_text("utf-8", errors="replace")
        except FileNotFoundError:
            continue
        return _parse_outcome(kind, text)
    return None


def _parse_outcome(kind: str, text: str) -> Outcome:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return Outcome(kind, f"{kind} is no file of this project")
    return Outcome(
        kind,
        str(content.get("reason") or ""),
        content.get("needs_person") is True,
        {name: content[name] for name in _FAILURE if name in content},
    )


def forget_outcome(path: Path) -> None:
    """Remove the outcome of the last job from the run directory `path`.

    It stays in `jobs.jsonl`. A job that failed or was killed has not written it there itself, so
    this does: any rank may have failed, but only the holder of the run's lock, which the caller
    must be, writes there.
    """
    outcome, paths = read_outcome(path), RunPaths(path)
    journal = read_journal(paths.journal)
    trained = bool(journal) and journal[-1]["event"] != END
    if trained or (outcome is not None and outcome.kind == FAILED):
        outcome = outcome or KILLED
        reason = {"reason": outcome.reason} if outcome.reason else {}
        step = metrics.last_step(paths.metrics)
        Journal(paths.journal).end(outcome.kind, {"step": step, **reason, **outcome.failure})
    _remove_outcome_files(path)


def _remove_outcome_files(path: Path) -> None:
    for kind in (FINISHED, STOPPED, FAILED):
        (path / kind).unlink(missing_ok=True)
    sync_to_disk(path)


def restore_finished(path: Path) -> None:
    """Restore the outcome of a finished run whose job was refused before it trained.

    The caller removed that outcome (`forget_outcome`) before the job began, and holds the run's
    lock.
    """
    journal = read_journal(RunPaths(path).journal)
    if journal and journal[-1]["event"] == END and journal[-1]["outcome"] == FINISHED:
        facts = {key: fact for key, fact in journal[-1].items() if key not in _OF_EVENTS}
        _remove_outcome_files(path)
        write_atomically(path / FINISHED, _as_text(facts))


def record_failure(path: Path, rank: int, error: BaseException) -> None:
    """Leave `FAILED` in the run directory `path` from any rank, whoever holds its lock.

    The failure recorded first stays, since those of other ranks mostly follow from it. Only the
    rank that recorded it can replace it, once it knows more. A problem in writing the file is only
    logged, so that `error` stays the error that is reported.
    """
    reason: dict[str, object] = {
        "rank": rank,
        "host": socket.gethostname(),
        "error": type(error).__name__,
        "reason": str(error) or type(error).__name__,
        "needs_person": isinstance(error, UserError),
    }
    if details := details_of(error):
        reason["details"] = details
    try:
        # A file name in a message may contain characters that UTF-8 cannot encode.
        text = _as_text(reason).encode("utf-8", "backslashreplace").decode()
        is_taken = (path / FAILED).exists() or not write_if_absent(path / FAILED, text)
        if is_taken and _failed_rank(path) in (None, rank):
            write_atomically(path / FAILED, text)
    except OSError as problem:
        logger.warning("cannot write %s: %s", path / FAILED, problem)


def _failed_rank(path: Path) -> object:
    """The rank that left `FAILED`; None if there is none, or the file is not one of ours."""
    try:
        return json.loads((path / FAILED).read_bytes())["rank"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


def _as_text(reason: Mapping[str, object]) -> str:
    return json.dumps(dict(reason), ensure_ascii=False, indent=2) + "\n"
