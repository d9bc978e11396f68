"""Files and folders that appear whole or not at all, and survive a loss of power once they do."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

TEMPORARY_INFIX = ".tmp-"

StrPath: TypeAlias = str | os.PathLike[str]
"""A path as callers from Python have it."""

# Errors by which a file system says that it has no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

Write: TypeAlias = Callable[[bytes | memoryview], None]
"""Appends bytes (a memoryview must be one of bytes) to a file."""


def temporary_path(final: Path) -> Path:
    """Return an unused name beside `final`; a rename between the two never leaves the disk."""
    return final.with_name(f"{final.name}{TEMPORARY_INFIX}{secrets.token_hex(4)}")


def sync_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Write]:
    """Write a file from front to back; when the block has ended its bytes are on the disk.

    Nothing is buffered here, and what the file held before is gone at once.

    Raises:
        OSError: The host could not write; what was written is left where it is.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(data: bytes | memoryview) -> None:
        rest = memoryview(data)
        # The host takes at most 2 GiB at once, and less where a disk is nearly full.
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    try:
        yield write
        # On the descriptor that wrote: another may not be told of an error in the meantime.
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path` and wait until it is on the disk.

    Raises:
        OSError: The host could not write; what was written is left where it is.
    """
    with new_file(path) as write:
        write(content.encode() if isinstance(content, str) else content)


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; when the block ends, the whole file is renamed to `path`.

    For code that can only write to a file's name; `write_atomically` writes content in memory.

    Raises:
        OSError: The host could not write; the old file is as it was and no temporary is left.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        sync_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) so that readers see the old file or the new one whole.

    Raises:
        OSError: The host could not write; the old file is as it was and no temporary is left.
    """
    with appearing_whole(path) as temporary:
        write_durably(temporary, content)


def write_if_absent(path: Path, content: str | bytes) -> bool:
    """Do as `write_atomically` where there is no file yet, and say whether it was written.

    If several processes do so at once, one succeeds. (Where files cannot be linked, more may.)

    Raises:
        OSError: The host could not write; no temporary is left.
    """
    temporary = temporary_path(path)
    try:
        write_durably(temporary, content)
        _give_name(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_to_disk(path.parent)
    return True


def _give_name(temporary: Path, path: Path) -> None:
    """Give the file its final name; unlike a rename, this fails if such a file exists."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        temporary.replace(path)
