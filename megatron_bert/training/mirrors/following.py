"""Reads a metrics file while it is written, and remembers how far."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_bert.files import write_atomically
from megatron_bert.training.metrics import parse_record


class Bookmark:
    """How far a metrics file was read, kept in a file over the jobs of a run.

    It counts in steps, not bytes: the next job of the run removes the lines after its checkpoint
    and writes them again, alike.

    Args:
        path: the file; need not exist.

    Raises:
        ValueError: the file is none of ours.

    Attributes:
        run_id: what the run is called where the copy is, or "".
        step: the last step of which lines were read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.run_id, self.step, self._lines = "", 0, 0
        if path.exists():
            kept = json.loads(path.read_text())
            self.run_id, self.step, self._lines = kept["id"], kept["step"], kept["lines"]
        self._seen = 0
        self._seen_step = 0

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
        """Write the mark."""
        kept = {"id": self.run_id, "step": self.step, "lines": self._lines}
        write_atomically(self._path, json.dumps(kept) + "\n")


class FollowedFile:
    """The whole lines of a metrics file, in the order in which they come.

    Args:
        path: the file; need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: TextIO | None = None
        self._torn = ""

    def __enter__(self) -> FollowedFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def new_records(self) -> Iterator[dict[str, Any]]:
        """Yield what was added since the last call; a line that is still written waits for it."""
        if self._stream is None:
            if not self._path.exists():
                return
            self._stream = self._path.open(encoding="utf-8", errors="replace", newline="\n")
        for line in self._stream:
            self._torn += line
            if not line.endswith("\n"):
                return
            record = parse_record(self._torn)
            self._torn = ""
            if record is not None and "step" in record:
                yield record


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by name, those of inner objects as `outer/inner`."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            inner = scalars(value).items()
            found.update((f"{name}/{inner_name}", number) for inner_name, number in inner)
        elif isinstance(value, int | float):
            found[name] = float(value)
    return found
