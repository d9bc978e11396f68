"""`jobs.jsonl`: what the jobs of a run did, one JSON object a line: began, saved, ended.

Whole lines are only ever appended, by the one process that holds the run's lock: what a later job
prunes, repeats or removes is still recorded here.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_bert.checkpoint.save_result import SaveResult
from megatron_bert.run import metrics

START, SAVE, SAVE_FAILED, END = "start", "save", "save failed", "end"
# Where Slurm and Grid Engine tell a job its number.
_JOB_NUMBERS = ("SLURM_JOB_ID", "JOB_ID")

logger = logging.getLogger(__name__)


class Journal:
    """Appends a job's lines to `jobs.jsonl`.

    A line that cannot be written is left out with a warning. It does not end the training, because
    checkpoints and metrics do not depend on it.

    Two threads write: the main one, and the one that saves in the background. An abandoned save may
    outlive its job and report its result while the next job of the same process writes with a
    journal of its own. So `end` and `close` close this one, and later lines are not written.

    Args:
        path: The file; made by the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends_whole = False
        self._is_closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """Write no more lines from now on; wait for one that is being written."""
        with self._lock:
            self._is_closed = True

    def start(self, step: int, ranks: int) -> None:
        """Record that this job begins to train.

        Args:
            step: The steps taken before it.
            ranks: The job's number of ranks.
        """
        self._append(
            START,
            job=next(filter(None, map(os.environ.get, _JOB_NUMBERS)), None),
            step=step,
            ranks=ranks,
            # Set by torchrun.
            nodes=int(os.environ.get("GROUP_WORLD_SIZE") or "1"),
        )

    def save(self, result: SaveResult) -> None:
        """Record the result of a save."""
        if result.error is not None:
            self._append(SAVE_FAILED, step=result.step, reason=result.error)
        else:
            self._append(
                SAVE,
                step=result.step,
                seconds=round(result.seconds, 3),
                blocked_seconds=round(result.blocked_seconds, 3),
                bytes=result.size,
            )

    def end(self, outcome: str, facts: dict[str, object]) -> None:
        """Record how a job ended, and close.

        Args:
            outcome: The name of the outcome's file, or `KILLED`.
            facts: What is known of it: `step`, `reason`.
        """
        self._append(END, is_last=True, outcome=outcome, **facts)

    def _append(self, event: str, *, is_last: bool = False, **facts: object) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = is_last
                time = datetime.now(UTC).isoformat(timespec="seconds")
                self._write({"event": event, "time": time, **facts})

    def _write(self, record: dict[str, object]) -> None:
        # Escaped to ASCII: a file name in a message may contain characters that UTF-8 cannot
        # encode.
        line = json.dumps(record) + "\n"
        try:
            if not self._ends_whole:
                # A killed job or a full disk may have left half a line; this one must not continue
                # it.
                metrics.cut_torn_line(self._path)
            self._ends_whole = False
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            self._ends_whole = True
        except OSError as error:
            logger.warning("cannot write %s, which lacks a line now: %s", self._path, error)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `jobs.jsonl` in the form in which they are written today, if readable.

    Lines that are not ours are left out: those of another event, and those that lack a field of
    their event.
    """
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
            records = [metrics.parse_record(line) for line in stream]
    except OSError:
        return []
    lines = [_in_todays_form(record) for record in records if record is not None]
    return [line for line in lines if _is_ours(line)]


def _in_todays_form(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a line without `event`: an earlier version only recorded when jobs `began`."""
    if "event" in record:
        return record
    time = {"time": record["began"]} if "began" in record else {}
    return {"event": START, **record, **time}


def _is_ours(line: dict[str, Any]) -> bool:
    event = line["event"]
    needed = _FIELDS.get(event) if isinstance(event, str) else None
    return (
        needed is not None
        and all(name in line and holds(line[name]) for name, holds in needed.items())
        and all(isinstance(line.get(name, ""), str) for name in ("time", "reason"))
    )


def _is_amount(value: object) -> bool:
    # None of our formats could show larger ones; NaN is not an amount.
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 2**63


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_amount(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# The fields that a line of each event must have to appear in the report.
_FIELDS: dict[str, dict[str, Callable[[object], bool]]] = {
    START: {
        "job": lambda value: value is None or _is_text(value),
        "step": _is_count,
        "ranks": _is_count,
        "nodes": _is_count,
    },
    SAVE: {
        "step": _is_count,
        "seconds": _is_amount,
        "blocked_seconds": _is_amount,
        "bytes": _is_count,
    },
    SAVE_FAILED: {"step": _is_count, "reason": _is_text},
    END: {"step": _is_count, "outcome": _is_text},
}
