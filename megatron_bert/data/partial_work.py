"""Work that a later job continues: files that grow, and a journal of how much of them counts."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_bert.config.errors import DataError
from megatron_bert.files import sync_to_disk, write_atomically
from megatron_bert.locks import FileInUseError, lock_file

_VERSION = 1
_JOURNAL = "journal.json"
_LOCK = "lock"
# What a killed job loses at most, against the time that the disk needs for so many bytes.
_SECONDS_BETWEEN_COMMITS = 15.0
_BYTES_BETWEEN_COMMITS = 1 << 28


class PartialWork:
    """A folder that one live job at a time appends to.

    What was appended counts once it is committed: a successor of a job that died, at whatever
    moment, finds the files as they were at the last commit. As a context manager it lets go of the
    folder at the end, and removes it where nothing was ever committed.

    Attributes:
        path: the folder.
        progress: what was given to the last commit of an earlier job; None if there is none.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], *, restart: bool) -> None:
        """Lock the folder, made if need be, and go back to its last commit.

        Args:
            path: the folder.
            identity: what the work depends on, by name; it must be that of the earlier jobs.
            restart: whether work of earlier jobs is thrown away.

        Raises:
            DataError: another live job has the folder, its work was another, or its files are
                damaged.
            OSError: the folder cannot be used.
        """
        self.path = path
        self._identity = dict(identity)
        self._sizes: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._is_removed = False
        self.progress: dict[str, Any] | None = None
        path.mkdir(exist_ok=True)
        try:
            self._lock = lock_file(path / _LOCK)
        except FileInUseError as error:
            raise DataError(
                f"{path} is in use by a live job ({error}); wait for its end, or choose another "
                f"--output-prefix"
            ) from error
        try:
            self._recover(restart)
        except BaseException:
            self._leave()
            raise
        self._reset_clock()

    @property
    def is_commit_due(self) -> bool:
        """Whether a commit is worth its time."""
        return (
            time.monotonic() >= self._next_commit
            or self._bytes_since_commit >= _BYTES_BETWEEN_COMMITS
        )

    def size(self, name: str) -> int:
        """Bytes appended to a file."""
        return self._sizes.get(name, 0)

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Append numbers to a file.

        Raises:
            OSError: the disk failed; nothing may be committed after that.
        """
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = (self.path / name).open("ab", buffering=0)
        self._sizes[name] = self.size(name) + values.nbytes
        self._bytes_since_commit += values.nbytes
        left = memoryview(values.tobytes())
        while left:
            left = left[file.write(left) :]

    def read(self, name: str, kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """Map the numbers appended to a file, of a type that is given."""
        if not self.size(name):
            return np.empty(0, dtype=kind)
        return np.memmap(self.path / name, dtype=kind, mode="r")

    def commit(self, progress: Mapping[str, Any], *, last: bool = False) -> None:
        """Make all that was appended count.

        Args:
            progress: what it is, for a later job (JSON).
            last: whether nothing will be appended any more, and the files may be moved away.

        Raises:
            OSError: the disk failed; the commit before holds.
        """
        for name in self._files:
            sync_to_disk(self.path / name)
        journal = {
            "version": _VERSION,
            "identity": self._identity,
            "files": None if last else self._sizes,
            "progress": progress,
        }
        text = json.dumps(journal, ensure_ascii=False, indent=1) + "\n"
        write_atomically(self.path / _JOURNAL, text)
        self.progress = dict(progress)
        self._reset_clock()

    def remove(self) -> None:
        """Remove the folder; the journal goes after what it describes."""
        self._clear(keep=(_JOURNAL, _LOCK))
        self._clear(keep=(_LOCK,))
        (self.path / _LOCK).unlink()
        self.path.rmdir()
        self._is_removed = True

    def discard(self) -> None:
        """Let the folder go at the end, whatever was committed."""
        (self.path / _JOURNAL).unlink(missing_ok=True)

    def __enter__(self) -> PartialWork:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        for file in self._files.values():
            file.close()
        # Once it is removed, what has its name is another job's.
        if not self._is_removed and not (self.path / _JOURNAL).exists():
            self.remove()
        self._lock.close()

    def _reset_clock(self) -> None:
        self._next_commit = time.monotonic() + _SECONDS_BETWEEN_COMMITS
        self._bytes_since_commit = 0

    def _recover(self, restart: bool) -> None:
        if restart:
            # First of all: without its files a journal would describe damage.
            (self.path / _JOURNAL).unlink(missing_ok=True)
        journal = self._read_journal()
        if journal is None:
            self._clear(keep=(_LOCK,))
            return
        self._check_identity(journal["identity"])
        self.progress = journal["progress"]
        if journal["files"] is not None:
            self._clear(keep=(_LOCK, _JOURNAL, *journal["files"]))
            for name, size in journal["files"].items():
                _truncate(self.path / name, size)
            self._sizes = journal["files"]

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.path / _JOURNAL
        try:
            journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if journal["version"] != _VERSION:
                raise ValueError(f"version {journal['version']!r}, only {_VERSION} is known")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged or of another version ({error}); begin anew with --restart"
            ) from error
        return journal

    def _check_identity(self, earlier: Mapping[str, str]) -> None:
        different = [
            f"{name} was {earlier.get(name, 'not given')} and is now "
            f"{self._identity.get(name, 'not given')}"
            for name in {**earlier, **self._identity}
            if earlier.get(name) != self._identity.get(name)
        ]
        if different:
            raise DataError(
                f"{self.path} holds the work of a job that was not this one: "
                f"{'; '.join(different[:3])}{' ...' if len(different) > 3 else ''}. Give what was "
                f"given then, or begin anew with --restart"
            )

    def _clear(self, keep: Collection[str]) -> None:
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()


def _truncate(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise DataError(
            f"{path} has {found:,} bytes and its journal tells of {size:,}: it was damaged; "
            f"begin anew with --restart"
        )
    with path.open("ab") as file:
        file.truncate(size)
