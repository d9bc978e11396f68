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
    """Lock a file, created if needed, until the stream is closed; a stale file does no harm.

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
    """Release what `lock_file` returned, and remove its file if that is possible."""
    with stream, suppress(OSError):
        # While the lock is held: a process that has the file open then sees that it is gone.
        if _is_at(path, stream):
            path.unlink()


def describe_holder(path: Path) -> str:
    """Describe the process that last locked a file: its host, number and start."""
    try:
        return _describe_holder(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _describe_holder("")


def holder_lives(path: Path) -> bool | None:
    """Whether the process that last locked a file still lives; None if that cannot be told here.

    It cannot if the process is on another host or in another container, or if the file says
    nothing. The lock is not tried: a process that wanted it at that moment would be refused.
    """
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        if (holder["host"], holder["processes"]) != (socket.gethostname(), _process_namespace()):
            return None
        return _lives(int(holder["pid"]), holder["ticks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lives(pid: int, ticks: int) -> bool | None:
    """Whether the process that began then still lives, or another now has its number."""
    try:
        state, began = _state_and_ticks(pid)
    except (FileNotFoundError, ProcessLookupError):
        # A host may hide the processes of other users.
        return None if _exists(pid) else False
    return state not in ("Z", "X") and began == ticks


def _state_and_ticks(pid: int) -> tuple[str, int]:
    """A process's state, and its start in ticks since boot, which no set clock changes."""
    # After the program's name, which is in parentheses and may itself contain parentheses.
    state, *figures = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return state, int(figures[18])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _own_ticks() -> int | None:
    try:
        return _state_and_ticks(os.getpid())[1]
    except OSError:
        return None


def _process_namespace() -> str:
    """The namespace in which process numbers mean the same: a container has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "unknown"


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
    # Written in place: a file renamed to this path would not be the one that is locked.
    stream.truncate(0)
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": _process_namespace(),
        "ticks": _own_ticks(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    stream.write(json.dumps(holder) + "\n")
    stream.flush()


def _describe_holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"host {holder['host']}, process {holder['pid']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):
        # It was read between the moments when the other process locked it and wrote to it.
        return "which is just starting"
