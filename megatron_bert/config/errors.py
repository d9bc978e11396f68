"""Errors that a user can mend, and how a command line reports them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2


class UserError(Exception):
    """What the user gave cannot be used; the message names the thing, its value and the remedy."""


class ConfigError(UserError):
    """A configuration key is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A dataset, text file or tokenizer is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's `main` and leave the process with its exit code.

    A `UserError` becomes lines on standard error, each with `error:` before it, and exit code 2; an
    interrupt (Ctrl-C) such a line and exit code 1. Any other exception keeps its traceback and
    ends in exit code 1. A reader that went away early (`| head`) is no error.
    """
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        _write_error(str(error))
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt as interrupt:
        _write_error(str(interrupt) or "interrupted")
        sys.exit(1)
    except BrokenPipeError:
        # What is left in the buffer has no reader either: Python must not try it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(code or 0)


def _write_error(message: str) -> None:
    """Mark every line: a launcher may put those of other ranks between them."""
    sys.stderr.write("".join(f"error: {line}\n" for line in message.splitlines()))
