"""Whether another job follows one that has ended, judged by what it left in the run directory.

Exit codes do not tell: after a signal, torchrun ends with 1 even if every rank stopped cleanly.
"""

from __future__ import annotations

import enum
import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bert.checkpoint.folders import CheckpointFolders
from megatron_bert.config.run_paths import RunPaths
from megatron_bert.errors import UserError
from megatron_bert.files import write_atomically
from megatron_bert.run.directory import (
    FAILED,
    FINISHED,
    STOPPED,
    RunDirectory,
    forget_outcome,
    read_outcome,
    restore_finished,
)

HOLD = "HOLD"
"""A file that a user puts into the run directory: no job follows."""
LOCK_SECONDS = 20.0
"""How long a new job waits for the last ranks of the job before it to be gone."""
LEAST_STEPS = 10
"""Steps between two checkpoints that count as progress: fewer take less time than starting does."""
_TRIES = "tries.json"
ANY = "any"
"""Announced in place of a job's number while that is not known yet."""
_ANNOUNCED = "next_job"


class Next(enum.Enum):
    """What a job script is to do; the values are the words it reads."""

    FINISHED = "finished"
    AGAIN = "again"
    GIVE_UP = "give-up"
    REFUSED = "refused"
    HELD = "held"


@dataclass(frozen=True)
class Verdict:
    """What is to follow, and why, in words for the job's log."""

    next: Next
    reason: str


@dataclass(frozen=True)
class _Tries:
    """How many jobs in a row ended without progress from the checkpoint of `step`.

    `open`: a job has begun since and has not been judged yet.
    """

    step: int
    fruitless: int
    open: bool = False


def take_up(run_dir: Path, job: str, most_tries: int) -> None:
    """Note that a job begins; if it was not announced, forget the jobs counted so far.

    A job that was not announced was submitted by a person, who has fixed what ended the others. A
    job that is queued again under its own number counts as announced. If the scheduler queued it
    again, because a node failed, nobody has judged it; it is counted here.

    The outcome of the last job is removed: this job may die before its ranks do that, and must not
    be taken for finished because the run was finished before it was lengthened.

    Args:
        run_dir: the run directory, made if need be.
        job: the scheduler's number of the job.
        most_tries: as `judge` takes it.

    Raises:
        UserError: `HOLD` is there, or another job holds the run (nothing is changed in either
            case); or this job was started `most_tries` times without progress.
    """
    if (run_dir / HOLD).exists():
        raise UserError(f"{run_dir / HOLD}: this file holds the run; remove it to go on")
    with _lock(run_dir):
        told = _announced(run_dir)
        tries = _read(run_dir)
        if told not in (job, ANY):
            tries = _Tries(_newest_step(run_dir), 0)
        elif tries.open:
            tries = _count(run_dir)
            if tries.fruitless >= most_tries:
                raise UserError(
                    f"run.dir {run_dir}: {_in_words(tries)}, and the last was killed before it "
                    "could tell why; mend the cause and submit again"
                )
        _write(run_dir, replace(tries, open=True))
        if told != job:
            announce(run_dir, job)
        forget_outcome(run_dir)


def _lock(run_dir: Path) -> RunDirectory:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return RunDirectory(run_dir)
        except UserError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


def announce(run_dir: Path, job: str) -> None:
    """Note the number of the job that follows, or `ANY` before it is known."""
    path = RunPaths(run_dir).logs / _ANNOUNCED
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{job}\n")


def _announced(run_dir: Path) -> str | None:
    try:
        return (RunPaths(run_dir).logs / _ANNOUNCED).read_text("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def judge(run_dir: Path, most_tries: int) -> Verdict:
    """Say what follows the job that has just ended, and count it. Call it once per job.

    A job has made progress if the newest checkpoint is at least `LEAST_STEPS` newer than after the
    job before it. A failure that a person has to fix is not tried again.

    Args:
        run_dir: the run directory.
        most_tries: jobs in a row that may end without progress before the run is given up.
    """
    outcome = read_outcome(run_dir)
    if outcome is not None and outcome.kind == FINISHED:
        return Verdict(Next.FINISHED, "the run has finished")
    tries = _count(run_dir)
    ended = {
        None: "the job was killed, or never began to train",
        STOPPED: "the job stopped",
        FAILED: "the job failed",
    }[None if outcome is None else outcome.kind]
    if outcome is not None and outcome.reason:
        ended += f" ({outcome.reason})"
    ended += f"; the newest checkpoint is of step {tries.step}" if tries.step else "; no checkpoint"
    if (run_dir / HOLD).exists():
        return Verdict(Next.HELD, f"{ended}; remove {run_dir / HOLD} and submit again to go on")
    if outcome is not None and outcome.needs_person:
        with suppress(UserError), _lock(run_dir):
            restore_finished(run_dir)
        return Verdict(Next.REFUSED, f"{ended}; mend this and submit again")
    if tries.fruitless >= most_tries:
        return Verdict(
            Next.GIVE_UP,
            f"{ended}; {_in_words(tries)}, so no other follows; mend the cause and submit again",
        )
    return Verdict(Next.AGAIN, ended)


def _in_words(tries: _Tries) -> str:
    return f"{tries.fruitless} job(s) in a row brought no checkpoint {LEAST_STEPS} steps newer"


def _count(run_dir: Path) -> _Tries:
    newest = _newest_step(run_dir)
    before = _read(run_dir)
    if newest >= before.step + LEAST_STEPS:
        tries = _Tries(newest, 0)
    else:
        # Too few steps per job do not add up to progress, any more than none do.
        tries = _Tries(newest, before.fruitless + 1)
    _write(run_dir, tries)
    return tries


def _write(run_dir: Path, tries: _Tries) -> None:
    path = RunPaths(run_dir).logs / _TRIES
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(vars(tries)) + "\n")


def _read(run_dir: Path) -> _Tries:
    try:
        content = json.loads((RunPaths(run_dir).logs / _TRIES).read_bytes())
        return _Tries(
            int(content["step"]), int(content["fruitless"]), content.get("open", False) is True
        )
    except (OSError, ValueError, LookupError, TypeError):
        return _Tries(0, 0)


def _newest_step(run_dir: Path) -> int:
    folders = CheckpointFolders(RunPaths(run_dir).checkpoints, keep=1)
    return max(map(folders.step_of, folders.newest_first()), default=0)
