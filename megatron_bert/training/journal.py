"""`jobs.jsonl`: what the jobs of a run did, one JSON object a line: began, saved, ended.

Only ever appended to, by the one process that holds the run's lock: what a later job prunes, goes
back over or removes still stands here.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_bert.checkpoint.save_result import SaveResult
from megatron_bert.training import metrics

START, SAVE, SAVE_FAILED, END = "start", "save", "save failed", "end"
# Where Slurm and Grid Engine tell a job its number.
_JOB_NUMBERS = ("SLURM_JOB_ID", "JOB_ID")

logger = logging.getLogger(__name__)


class Journal:
    """Appends to `jobs.jsonl`.

    A line that cannot be written is told in a warning and is missing then: no training ends for
    it, as the checkpoints and metrics do not depend on it.

    Args:
        path: The file; made by the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends_whole = False

    def start(self, step: int, ranks: int) -> None:
        """Add that this job begins to train.

        Args:
            step: The steps taken before it.
            ranks: Those of the job.
        """
        self._append(
            START,
            job=next(filter(None, map(os.environ.get, _JOB_NUMBERS)), None),
            step=step,
            ranks=ranks,
            # Set by torchrun.
            nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        )

    def save(self, result: SaveResult) -> None:
        """Add what became of a save."""
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
        """Add how a job ended.

        Args:
            outcome: The name of the file that tells it, or `KILLED`.
            facts: What there is to tell of it: `step`, `reason`.
        """
        self._append(END, outcome=outcome, **facts)

    def _append(self, event: str, **facts: object) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        # Escaped to ASCII: a file's name in a message may hold what no UTF-8 has.
        line = json.dumps({"event": event, "time": time, **facts}) + "\n"
        try:
            if not self._ends_whole:
                # A killed job or a full disk left half a line, which this one would be glued to.
                metrics.MetricsFile(self._path).truncate_after(sys.maxsize)
            self._ends_whole = False
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            self._ends_whole = True
        except OSError as error:
            logger.warning("cannot write %s, which lacks a line now: %s", self._path, error)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `jobs.jsonl`, if it can be read; what is none of ours is left out.

    A line without `event` is of an earlier version, which recorded starts only.
    """
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
            records = [metrics.parse_record(line) for line in stream]
    except OSError:
        return []
    return [{"event": START, **record} for record in records if record is not None]
