"""Errors that a user can mend, and how a command line reports them."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from megatron_bert.config.arguments import as_options
from megatron_bert.config.checkout import warn_of_other_code

EXIT_USER_ERROR = 2


class UserError(Exception):
    """What the user gave cannot be used; the message names the thing, its value and the remedy."""


class ConfigError(UserError):
    """A configuration key is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A dataset, text file or tokenizer is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


class RunError(Exception):
    """What ended a run that was in order; the message says what it was and how to go on.

    Notes (`add_note`) are details, for those who look for the cause.
    """


class Parser(argparse.ArgumentParser):
    """A command line whose refusals are told as all others are; `run_cli` is around its `main`.

    Of its own it would write `usage: ... PROGRAM: error: ...`, in which nobody finds `error:` at
    the beginning of a line. Options are written out: what an abbreviation means would change
    with every option that comes, and `--overwrit` would replace a dataset.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Show the usage, and refuse what was given.

        Raises:
            ConfigError: always.
        """
        self.print_usage(sys.stderr)
        raise ConfigError(f"{message}; see {self.prog} --help")


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's `main` and leave the process with its exit code.

    What `main` raises is told as by `told_errors`, with arguments by the names of options.
    """
    with as_options(), told_errors():
        code = main()
        sys.stdout.flush()
    sys.exit(code or 0)


@contextmanager
def told_errors() -> Iterator[None]:
    """Tell what is raised inside as a command line does, and leave the process.

    A `UserError` becomes lines on standard error, each with `error:` before it, and exit code 2, as
    does a package that is not installed; a `RunError` or an interrupt (Ctrl-C) such lines and exit
    code 1. Any other exception keeps its traceback, with such lines behind it, and ends in exit
    code 1. A reader that went away early (`| head`) is no error.

    Before all else it is told where a script runs another checkout's code.

    A tool puts its imports here: they are what fails where packages are missing, and what takes
    long enough for a Ctrl-C.
    """
    warn_of_other_code()
    try:
        yield
    except UserError as error:
        _write_error(str(error))
        sys.exit(EXIT_USER_ERROR)
    except RunError as error:
        _write_error("\n".join([str(error), *details_of(error)]))
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        _write_error(str(interrupt) or "interrupted")
        sys.exit(1)
    except ModuleNotFoundError as error:
        _write_error(
            f"{error.name} is not installed for {sys.executable}; activate the environment that "
            "has it (source .venv/bin/activate), or install it: pip install -e ."
        )
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:
        # What is left in the buffer has no reader either: Python must not try it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        traceback.print_exc()
        _write_error(f"{type(error).__name__}: {error}")
        sys.exit(1)


def details_of(error: BaseException) -> list[str]:
    """The notes of an error, which Python keeps only where there are any."""
    return list(getattr(error, "__notes__", ()))


def _write_error(message: str) -> None:
    """Mark every line: a launcher may put those of other ranks between them."""
    sys.stderr.write("".join(f"error: {line}\n" for line in message.splitlines()))
