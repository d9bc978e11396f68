"""Reads a metrics file while it is written, and remembers how far."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_bert.closeable import Closeable
from megatron_bert.files import write_atomically
from megatron_bert.run.metrics import parse_record

logger = logging.getLogger(__name__)


class Bookmark:
    """How far a metrics file was read, kept in a file across the jobs of a run.

    It counts in steps, not bytes: the next job of the run removes the lines after its checkpoint
    and writes the same lines again.

    Args:
        path: the file; it need not exist. A file that is not one of ours is replaced.
        anew: whether the run began anew, so that what was read before belongs to another run.

    Attributes:
        step: the last step of which lines were read.
    """

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        self._path = path
        self._run_id, self.step, self._lines = "", 0, 0
        if path.exists() and not anew:
            try:
                kept = json.loads(path.read_text())
                self._run_id, self.step, self._lines = str(kept["id"]), kept["step"], kept["lines"]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                logger.warning("%s is damaged (%r): the metrics are copied anew", path, error)
        self._kept = self._content()
        self._seen = 0
        self._seen_step = 0

    @property
    def run_id(self) -> str:
        """The run's id where the copy is; if it has none yet, one is drawn and stored at once.

        Because it is stored before anything is sent, it stays the same however soon the process is
        killed.
        """
        if not self._run_id:
            self._run_id = uuid.uuid4().hex[:8]
            self.keep()
        return self._run_id

    def is_new(self, record: dict[str, Any]) -> bool:
        """Whether `record`, the file's next, was not read before; if so it is marked as read."""
        step = int(record["step"])
        self._seen = self._seen + 1 if step == self._seen_step else 1
        self._seen_step = step
        if (step, self._seen) <= (self.step, self._lines):
            return False
        self.step, self._lines = step, self._seen
        return True

    def keep(self) -> None:
        """Write the mark, if it has moved."""
        content = self._content()
        if content != self._kept:
            write_atomically(self._path, content)
            self._kept = content

    def _content(self) -> str:
        return json.dumps({"id": self._run_id, "step": self.step, "lines": self._lines}) + "\n"


class FollowedFile(Closeable):
    """The whole lines of a metrics file, in the order in which they are written.

    Args:
        path: the file; need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO | None = None
        self._torn = b""

    def close(self) -> None:
        """Close the file, where it was opened."""
        if self._stream is not None:
            self._stream.close()

    def new_records(self) -> Iterator[dict[str, Any]]:
        """Yield what was added since the last call; a line still being written has to wait."""
        if self._stream is None:
            if not self._path.exists():
                return
            self._stream = self._path.open("rb")
        for line in self._stream:
            self._torn += line
            if not line.endswith(b"\n"):
                return
            record = parse_record(self._torn.decode(errors="replace"))
            self._torn = b""
            if record is not None and "step" in record:
                yield record


def curves(record: dict[str, Any]) -> dict[str, float]:
    """Return a metrics line's numbers except its step, named `train/...` and `valid/...`.

    Those of inner objects are `outer/inner`; `valid_loss` is `valid/loss`.
    """
    place = "train" if "loss" in record else "valid"
    return {
        name if "/" in name else f"{place}/{name.removeprefix('valid_')}": number
        for name, number in _numbers(record)
        if name != "step"
    }


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float):
            yield name, float(value)
