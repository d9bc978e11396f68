"""Checking and preparing the places that a run or a tool writes to."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_bert.errors import UserError
from megatron_bert.files import write_atomically

# A variable ($NAME, ${NAME}, $1, $(command)), or a home folder (~, ~NAME).
_SHELL = re.compile(r"\$(?:\w+|\{[^}]*\}?|\([^)]*\)?)|^~[\w.-]*(?=/|$)")


def place_problem(path: Path) -> str | None:
    """Say why a path must not be written to; None if it may.

    A `..` after a name undoes it: `runs/NAME` is not in `runs` if NAME is `../../elsewhere`. At the
    beginning of a path it undoes nothing, and is how a user reaches a neighbouring folder.
    """
    named = itertools.dropwhile(lambda part: part == "..", path.parts)
    if ".." not in named:
        return None
    return f"leaves by `..` a folder that it names; give {os.path.normpath(path)} if that is meant"


def shell_problem(path: str) -> str | None:
    """Say which part of a path only a shell would replace; None if there is none.

    Args:
        path: as the configuration has it.
    """
    left = _SHELL.search(path)
    if left is None:
        return None
    if left[0] == "~":
        # No shell replaces this after `run.dir=`, with or without quotes.
        override = f"as an override, in double quotes: $HOME{path[1:]}"
    elif left[0].startswith("~"):
        return f"{left[0]} is for a shell, which reads no configuration file; write out that home"
    else:
        override = "give the key as an override, in double quotes"
    return (
        f"{left[0]} is for a shell, which reads no configuration file; write out what it stands "
        f"for, or {override}"
    )


def check_place(path: Path) -> None:
    """Refuse to write to a path that climbs out of a folder that it names.

    Raises:
        UserError: it does (see `place_problem`).
    """
    problem = place_problem(path)
    if problem is not None:
        raise UserError(f"cannot write {path}: it {problem}")


def check_no_folder(path: Path) -> None:
    """Refuse to write a file where a folder is, or by a path that climbs out.

    Raises:
        UserError: there is one, or see `check_place`.
    """
    check_place(path)
    # Returns False for a name that is too long, instead of raising.
    if os.path.isdir(path):  # noqa: PTH112
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")


def make_folder(path: Path) -> None:
    """Make the folder of a file to be written, and try writing there, before the work begins.

    Raises:
        UserError: the file could not be written there.
    """
    check_no_folder(path)
    with _told(path):
        _make(path.parent)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that a user named, completely or not at all; text as UTF-8; make its folder.

    Raises:
        UserError: the path climbs out of a folder that it names, or cannot be written.
    """
    check_no_folder(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with _told(path):
        _make(path.parent)
        write_atomically(path, data)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # The obstacle may be one of the parent folders, so name it.
        raise OSError(error.errno, f"cannot make {error.filename}: {error.strerror}") from error


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Report errors raised inside with the name that the user gave, not a temporary one."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from error
