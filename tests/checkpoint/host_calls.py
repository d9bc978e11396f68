"""The calls that a save makes to the host, laid open: to be counted, refused, held or cut short.

Everything that a checkpoint's files go through is a function of `os`, so that a test can stand
between any two of them.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


@dataclass(frozen=True)
class HostCall:
    """A call about to be made: its name in `os` and the path that it works on."""

    name: str
    path: Path


@contextmanager
def before_host_calls(hook: Callable[[HostCall], None]) -> Iterator[None]:
    """Call `hook` before each call inside the block, in any thread; what it raises is the call's.

    Only calls on paths count that `hook` can know: those on other descriptors, such as the
    terminal's, pass by.
    """
    opened: dict[int, Path] = {}

    def hooked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def hook_and_work(subject: Any, *args: Any, **options: Any) -> Any:
            path = opened.get(subject) if isinstance(subject, int) else Path(os.fspath(subject))
            if path is None:
                return work(subject, *args, **options)
            hook(HostCall(name, path))
            result = work(subject, *args, **options)
            if name == "open":
                opened[result] = path
            return result

        return hook_and_work

    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setattr(os, name, hooked(name, getattr(os, name)))
        yield


def dies_at(call: int) -> Callable[[HostCall], None]:
    """Make a hook that ends the process, as kill -9 does, instead of the call of this number."""
    calls = itertools.count()

    def die(_call: HostCall) -> None:
        if next(calls) == call:
            os._exit(9)

    return die


def disk_full_at(name: str, pattern: str) -> Callable[[HostCall], None]:
    """Make a hook for which no space is left for calls of a name on paths like `pattern`."""

    def refuse(call: HostCall) -> None:
        if call.name == name and call.path.match(pattern):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(call.path))

    return refuse
