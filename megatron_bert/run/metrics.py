"""`metrics.jsonl`: what a run measured, one JSON object a line.

Floats are written by `repr`, so they read back to the same bits. JSON has no numbers for non-finite
values: these are written as the strings "NaN", "Infinity" and "-Infinity", which `float`
understands.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from megatron_bert.config.run_paths import RunPaths
from megatron_bert.errors import RunError, UserError
from megatron_bert.files import write_atomically

# Many times the size of a line, even of an evaluation of many texts.
_END_BYTES = 1 << 16
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends records to a metrics file.

    Call `truncate_after` before the first `write` of a job: it also removes a line that a killed
    job left half-written, which the next record would otherwise continue.

    Args:
        path: The file; made by the first `write`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: TextIO | None = None

    def truncate_after(self, step: int, *, sets_aside: bool = False) -> list[str]:
        """Keep only the whole lines whose `step` is at most `step`, unchanged.

        Args:
            step: The step that the job goes on from.
            sets_aside: Whether to keep the old file under another name, with a warning, if lines of
                later steps would be lost, because no checkpoint leads to them again.

        Returns:
            The lines kept.

        Raises:
            RunError: The file could not be rewritten; it is as it was.
        """
        self.close()
        if not self.path.exists():
            return []
        lines = _lines(self.path)
        kept: list[str] = []
        later = 0
        for number, line in enumerate(lines, start=1):
            record = parse_record(line)
            if record is None:
                logger.warning("%s line %d is no record and is removed", self.path, number)
            elif record.get("step", step) <= step:
                kept.append(line)
            else:
                later = max(later, record["step"])
        if later and sets_aside:
            self._set_aside(step, later)
        if kept != lines:
            try:
                write_atomically(self.path, "".join(kept))
            except OSError as error:
                raise self._unwritable(error) from error
        return kept

    def write(self, record: Mapping[str, object]) -> None:
        """Append `record` as one line and flush it.

        Args:
            record: JSON values by name; `step` says after which optimizer step.

        Raises:
            RunError: The host could not write; part of the line may have been written.
        """
        line = json.dumps(_encode(record), ensure_ascii=False, allow_nan=False)
        try:
            if self._stream is None:
                self._stream = self.path.open("a", encoding="utf-8")
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def sync(self) -> None:
        """Wait until all lines are on the disk, so that no checkpoint outlives its metrics.

        Raises:
            RunError: The host could not write.
        """
        try:
            if self._stream is not None:
                os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RunError:
        stream, self._stream = self._stream, None
        if stream is not None:
            # Closing tries once more to write what is left in the buffer.
            with suppress(OSError):
                stream.close()
        return RunError(
            f"cannot write {self.path}: {error.strerror}; mend that, by making room if the disk is "
            "full, and give the same command again: it goes on from the last "
            "checkpoint, where there is one"
        )

    def _set_aside(self, step: int, later: int) -> None:
        names = (self.path.with_suffix(f".before-{n}.jsonl") for n in itertools.count(1))
        place = next(name for name in names if not name.exists())
        self.path.rename(place)
        logger.warning(
            "%s has steps up to %s, and %s holds no checkpoint to go on from: the run begins anew "
            "at step %s, and that file is kept as %s",
            self.path,
            f"{later:,}",
            RunPaths(self.path.parent).checkpoints,
            f"{step + 1:,}",
            place.name,
        )

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
    return [record for record in stream(path) if record is not None]


def stream(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield what `read` returns, a record at a time, and None at the end for a torn last line.

    Raises:
        UserError: As `read`.
    """
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                record = parse_record(line)
                if record is not None:
                    yield {name: _decode(value) for name, value in record.items()}
                elif next(lines, None) is None:
                    yield None
                else:
                    raise UserError(f"{path} line {number}: not a record; remove the line")
    except OSError as error:
        raise UserError(
            f"{path}: cannot read metrics ({error.strerror}); name a run that has some"
        ) from error


def last_losses(lines: Sequence[str], count: int) -> list[tuple[float, int]]:
    """Return loss and stage of the last steps, oldest first, that were not skipped.

    Args:
        lines: Of a metrics file.
        count: How many steps, at most.
    """
    records = filter(None, map(parse_record, reversed(lines)))
    taken = (r for r in records if {"loss", "stage"} <= r.keys() and not r.get("skipped"))
    losses = [(record["loss"], record["stage"]) for record in itertools.islice(taken, count)]
    return losses[::-1]


def last_step(path: Path) -> int:
    """Return the step of a metrics file's last whole line, reading only its end; 0 if none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _END_BYTES))
            # A torn line at the end is dropped; one at the beginning does not parse as a record.
            lines = stream.read().decode("utf-8", "replace").split("\n")[:-1]
    except OSError:
        return 0
    records = filter(None, (parse_record(f"{line}\n") for line in reversed(lines)))
    steps = (record.get("step") for record in records)
    return next((step for step in steps if isinstance(step, int)), 0)


def _open(path: Path) -> TextIO:
    # Not str.splitlines: it also breaks at characters that a JSON string may hold, e.g. U+2028.
    return path.open(encoding="utf-8", errors="replace", newline="\n")


def _lines(path: Path) -> list[str]:
    with _open(path) as lines:
        return list(lines)


def parse_record(line: str) -> dict[str, Any] | None:
    """Return a line's object, not decoded, or None if the line is torn or not one of ours."""
    if not line.endswith("\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def cut_torn_line(path: Path) -> None:
    """Cut off what follows a file's last line break; everything before it is unchanged.

    Raises:
        OSError: The file could not be opened, read or cut.
    """
    try:
        stream = path.open("r+b")
    except FileNotFoundError:
        return
    with stream:
        size = stream.seek(0, os.SEEK_END)
        place, start = -1, size
        while place < 0 and start > 0:
            end, start = start, max(0, start - _END_BYTES)
            stream.seek(start)
            place = stream.read(end - start).rfind(b"\n")
        whole = start + place + 1
        if whole < size:
            stream.truncate(whole)


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
