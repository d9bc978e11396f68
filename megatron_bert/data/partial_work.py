"""Work that a later job can continue: growing files, and a journal of how much of them counts."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bert.closeable import Closeable
from megatron_bert.command_line.arguments import argument
from megatron_bert.errors import DataError
from megatron_bert.files import TEMPORARY_INFIX, sync_to_disk, write_atomically
from megatron_bert.locks import FileInUseError, lock_file, remove_lock

_VERSION = 1
_JOURNAL = "journal.json"
# The name that NFS gives a removed file that is still open; it disappears when it is closed.
_REMOVED_PREFIX = ".nfs"
# The most that a killed job loses, traded against the time that the disk needs for a commit.
_SECONDS_BETWEEN_COMMITS = 15.0
_BYTES_BETWEEN_COMMITS = 1 << 28


class _Journal(NamedTuple):
    identity: dict[str, str]
    # Bytes that count, by file name; None: nothing more will be appended.
    files: dict[str, int] | None
    progress: dict[str, Any]


class PartialWork(Closeable):
    """A folder that one live job at a time appends to.

    Appended data counts once it is committed: whenever a job dies, its successor finds the files as
    they were at the last commit. As a context manager it releases the folder at the end, and
    removes it if nothing was ever committed. A lock beside the folder (`.lock` added to its name)
    tells others of a live job.

    Attributes:
        path: the folder.
        progress: the `progress` of the last commit, by this job or an earlier one; None if there is
            none.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, str],
        *,
        names: Collection[str],
        restart: bool,
    ) -> None:
        """Lock the folder, creating it if needed, and go back to its last commit.

        Args:
            path: the folder.
            identity: what the work depends on, by name; must equal that of the earlier jobs.
            names: all files that the job may put in the folder; no others are ever removed.
            restart: whether work of earlier jobs is thrown away.

        Raises:
            DataError: another live job has the folder, it holds work of another identity, its
                files are damaged, or it holds something that no job has put there.
            OSError: the folder cannot be used.
        """
        self.path = path
        self._identity = dict(identity)
        self._sizes: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._names = {_JOURNAL, *names}
        self._is_ours = False
        self.progress: dict[str, Any] | None = None
        self._lock_path = path.with_name(f"{path.name}.lock")
        try:
            self._lock = lock_file(self._lock_path)
        except FileInUseError as error:
            raise DataError(
                f"{path} is in use by a live job ({error}); wait for its end, or choose another "
                f"{argument('output_prefix')}"
            ) from error
        try:
            path.mkdir(exist_ok=True)
            self._check_is_ours()
            self._recover(restart)
        except BaseException:
            self.close()
            raise
        self._reset_clock()

    @property
    def is_commit_due(self) -> bool:
        """Whether enough time or data has accumulated to be worth a commit."""
        return (
            time.monotonic() >= self._next_commit
            or self._bytes_since_commit >= _BYTES_BETWEEN_COMMITS
        )

    def size(self, name: str) -> int:
        """Bytes appended to a file."""
        return self._sizes.get(name, 0)

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Append numbers to a file, which must be one of the `names`.

        Raises:
            OSError: the disk failed; nothing may be committed after that.
        """
        file = self._files.get(name)
        if file is None:
            assert name in self._names
            file = self._files[name] = (self.path / name).open("ab", buffering=0)
        self._sizes[name] = self.size(name) + values.nbytes
        self._bytes_since_commit += values.nbytes
        left = memoryview(values.tobytes())
        while left:
            left = left[file.write(left) :]

    def read(self, name: str, kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """Memory-map the numbers appended to a file, as the given dtype."""
        if not self.size(name):
            return np.empty(0, dtype=kind)
        return np.memmap(self.path / name, dtype=kind, mode="r")

    def commit(self, progress: Mapping[str, Any], *, last: bool = False) -> None:
        """Make everything appended so far count.

        Args:
            progress: a description of it for a later job (JSON).
            last: whether nothing more will be appended and the files may be moved away.

        Raises:
            OSError: the disk failed; the previous commit still holds.
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
        """Remove the folder; if others have put files there, leave it with those.

        Raises:
            OSError: the disk failed.
        """
        # NFS would keep an open file under another name, and the folder with it.
        self._close_files()
        # The journal is removed after the files that it describes.
        self._clear(keep=(_JOURNAL,))
        self._clear(keep=())
        try:
            self.path.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        self._is_ours = False

    def discard(self) -> None:
        """Have the folder removed at the end, whatever was committed."""
        (self.path / _JOURNAL).unlink(missing_ok=True)

    def close(self) -> None:
        """Keep the folder if it has a commit to continue from, else remove it; release the lock."""
        try:
            self._close_files()
            if self._is_ours and not (self.path / _JOURNAL).exists():
                self.remove()
        finally:
            remove_lock(self._lock_path, self._lock)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _reset_clock(self) -> None:
        self._next_commit = time.monotonic() + _SECONDS_BETWEEN_COMMITS
        self._bytes_since_commit = 0

    def _check_is_ours(self) -> None:
        foreign = sorted(
            path.name
            for path in self.path.iterdir()
            if not self._is_known(path.name) and not path.name.startswith(_REMOVED_PREFIX)
        )
        if foreign and not self._has_journal():
            raise DataError(
                f"{self.path} holds {foreign[0]} and is no folder of an unfinished job; move it "
                f"away, or choose another {argument('output_prefix')}"
            )
        self._is_ours = True

    def _has_journal(self) -> bool:
        try:
            return self._read_journal() is not None
        except DataError:
            return False

    def _is_known(self, name: str) -> bool:
        return name.partition(TEMPORARY_INFIX)[0] in self._names

    def _recover(self, restart: bool) -> None:
        if restart:
            # First of all: a journal without its files would read as damage.
            (self.path / _JOURNAL).unlink(missing_ok=True)
        journal = self._read_journal()
        if journal is None:
            self._clear(keep=())
            return
        self._check_identity(journal.identity)
        self.progress = journal.progress
        if journal.files is not None:
            self._clear(keep=(_JOURNAL, *journal.files))
            for name, size in journal.files.items():
                _truncate(self.path / name, size)
            self._sizes = journal.files

    def _read_journal(self) -> _Journal | None:
        path = self.path / _JOURNAL
        try:
            return self._parse_journal(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged or of another version ({type(error).__name__}: {error}); "
                f"begin anew with {argument('restart', True)}"
            ) from error

    def _parse_journal(self, content: Any) -> _Journal:
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}, only {_VERSION} is known")
        files, progress = content["files"], content["progress"]
        if files is not None:
            files = dict(files.items())
            for name, size in files.items():
                if name not in self._names or not isinstance(size, int) or size < 0:
                    raise ValueError(f"file {name!r} of {size!r} bytes")
        return _Journal(dict(content["identity"].items()), files, dict(progress.items()))

    def _check_identity(self, earlier: Mapping[str, str]) -> None:
        different = [
            f"{argument(name) if name.isidentifier() else name} was "
            f"{earlier.get(name, 'not given')} and is now "
            f"{self._identity.get(name, 'not given')}"
            for name in {**earlier, **self._identity}
            if earlier.get(name) != self._identity.get(name)
        ]
        if different:
            raise DataError(
                f"{self.path} holds the work of a job that was not this one: "
                f"{'; '.join(different[:3])}{' ...' if len(different) > 3 else ''}. Give what was "
                f"given then, or begin anew with {argument('restart', True)}"
            )

    def _clear(self, keep: Collection[str]) -> None:
        for path in self.path.iterdir():
            if self._is_known(path.name) and path.name not in keep:
                path.unlink()


def _truncate(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise DataError(
            f"{path} has {found:,} bytes and its journal tells of {size:,}: it was damaged; "
            f"begin anew with {argument('restart', True)}"
        )
    with path.open("ab") as file:
        file.truncate(size)
