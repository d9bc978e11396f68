"""`metrics.jsonl`: what a run measured, one JSON object a line.

Floats are written by `repr`, so they read back to the same bits. JSON has no numbers for what is
not finite: these are the strings "NaN", "Infinity" and "-Infinity", which `float` understands.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_bert.config.errors import UserError
from megatron_bert.files import write_atomically

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends records to a metrics file.

    Call `truncate_after` before the first `write` of a job: it also removes the line that a killed
    job left half-written, which the next record would otherwise be glued to.

    Args:
        path: The file; made by the first `write`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: TextIO | None = None

    def truncate_after(self, step: int) -> None:
        """Keep only the lines whose `step` is at most `step`, as they are, and no torn line.

        Raises:
            OSError: The file could not be rewritten; it is as it was.
        """
        self.close()
        if not self.path.exists():
            return
        lines = _lines(self.path)
        kept: list[str] = []
        for number, line in enumerate(lines, start=1):
            record = parse_record(line)
            if record is None:
                logger.warning("%s line %d is no record and is removed", self.path, number)
            elif record.get("step", step) <= step:
                kept.append(line)
        if kept != lines:
            write_atomically(self.path, "".join(kept))

    def write(self, record: Mapping[str, object]) -> None:
        """Append `record` as one line and flush it.

        Args:
            record: JSON values by name; `step` says after which optimizer step.
        """
        if self._stream is None:
            self._stream = self.path.open("a", encoding="utf-8")
        line = json.dumps(_encode(record), ensure_ascii=False, allow_nan=False)
        self._stream.write(line + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk, so that no checkpoint outlives its metrics."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file; a later `write` opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def read(path: Path) -> list[dict[str, Any]]:
    """Return all records of a metrics file, in order; a torn last line is left out.

    Raises:
        UserError: The file is missing, or a line before the last is no record (the message has
            its number).
    """
    try:
        lines = _lines(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read metrics ({error.strerror})") from error
    return list(_records(path, lines))


def _lines(path: Path) -> list[str]:
    # Not str.splitlines: it also breaks at characters that a JSON string may hold, e.g. U+2028.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        return list(stream)


def _records(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            yield {name: _decode(value) for name, value in record.items()}
        elif number < len(lines):
            raise UserError(f"{path} line {number}: not a record; remove the line")


def parse_record(line: str) -> dict[str, Any] | None:
    """Return a line's object as it stands there, or None where it is torn or none of ours."""
    if not line.endswith("\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _encode(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _decode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
