"""A directory that appears whole or not at all."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from megatron_bert.command_line.places import check_place
from megatron_bert.errors import CheckpointError
from megatron_bert.files import sync_to_disk, temporary_path


def check_is_new(output: Path) -> None:
    """Refuse what would be overwritten.

    Raises:
        UserError: `output` climbs out by `..`.
        CheckpointError: `output` exists, and is not an empty directory, or cannot be looked at.
    """
    check_place(output)
    try:
        is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error}; name another place") from error
    if is_taken:
        raise CheckpointError(f"{output} exists already; name a new directory, or remove it first")


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yield a folder to fill with durably written files; it gets its name when the block ends.

    Args:
        output: the directory to make; it must not exist yet, or be empty.

    Raises:
        CheckpointError: it exists, or the host cannot write there. Nothing is left behind then, nor
            if the block raises anything else, nor after a SIGTERM.
    """
    check_is_new(output)
    with _unwound_by_sigterm():
        yield from _filled(output)


def _filled(output: Path) -> Iterator[Path]:
    output = output.absolute()
    staging = temporary_path(output)
    new_parents = [folder for folder in output.parents if not folder.exists()]
    try:
        staging.mkdir(parents=True)
        yield staging
        sync_to_disk(staging)
        staging.replace(output)
        sync_to_disk(output.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {output}: {error}; free space or name another place"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in new_parents:
            # Fails if all went well, because the folder is no longer empty then.
            with suppress(OSError):
                folder.rmdir()


class _TerminatedError(BaseException):
    """SIGTERM has come."""


@contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Let a SIGTERM unwind the block like an exception, and then end the process as it would have.

    A handler that somebody has set is left alone. Nothing is done in a thread, which may not set
    one.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except _TerminatedError:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_terminated(*_: object) -> NoReturn:
    # A second SIGTERM must not cut the removal short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedError
