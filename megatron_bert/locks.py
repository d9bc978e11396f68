"""Locks on files that end with the process that holds them, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO


class FileInUseError(Exception):
    """Another live process holds the lock; the text names its host and number."""


def lock_file(path: Path) -> TextIO:
    """Lock a file, made if need be, until the stream is closed; a stale file needs no care.

    Raises:
        FileInUseError: another live process holds the lock.
        OSError: the file cannot be made or locked.
    """
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            _hold(stream)
            # Its last holder may have removed it in the meantime.
            if _is_at(path, stream):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def remove_lock(path: Path, stream: TextIO) -> None:
    """Let go of what `lock_file` returned, and remove its file unless that cannot be."""
    with stream, suppress(OSError):
        # While it is held: who has opened it sees afterwards that it is gone.
        if _is_at(path, stream):
            path.unlink()


def _is_at(path: Path, stream: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _hold(stream: TextIO) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.seek(0)
        raise FileInUseError(_describe_holder(stream.read())) from error
    # Written in place: a renamed file would be another than the one that is locked.
    stream.truncate(0)
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    stream.write(json.dumps(holder) + "\n")
    stream.flush()


def _describe_holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"host {holder['host']}, process {holder['pid']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):
        # It was read in the moment between the other's lock and its writing.
        return "which is just starting"
