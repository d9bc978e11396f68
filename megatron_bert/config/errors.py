"""Errors that a user can fix, and how a command line reports them."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from megatron_bert.config.arguments import as_options
from megatron_bert.config.checkout import warn_of_other_code

EXIT_USER_ERROR = 2


class UserError(Exception):
    """The user's input cannot be used; the message names the input, its value and the remedy."""


class ConfigError(UserError):
    """A configuration key is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A dataset, text file or tokenizer is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


class RunError(Exception):
    """Something ended a valid run; the message says what it was and how to continue.

    Notes (`add_note`) are details for whoever looks for the cause.
    """


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors as everything else does, through `run_cli`.

    By default argparse would write `usage: ... PROGRAM: error: ...`, so that no line begins with
    `error:`. Options cannot be abbreviated: the meaning of an abbreviation would change whenever an
    option is added, and `--overwrit` would replace a dataset.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Show the usage and refuse the arguments.

        Raises:
            ConfigError: always.
        """
        self.print_usage(sys.stderr)
        raise ConfigError(f"{message}; see {self.prog} --help")

    def check_purposes(
        self, given: argparse.Namespace, purposes: Iterable[tuple[str, bool, str]]
    ) -> None:
        """Refuse what was given and would have no effect.

        What was given with its default value is taken for not given.

        Args:
            given: what this parser made of the command line.
            purposes: options (`--steps`) and other arguments (`overrides`) without a use in every
                call, each with whether it has one in this call, and what would give it one.

        Raises:
            ConfigError: there is such an argument.
        """
        for name, has_effect, remedy in purposes:
            key = name.removeprefix("--").replace("-", "_")
            value = getattr(given, key)
            default = self.get_default(key)
            # Of a switch that is not given, an option, and a list that may be empty.
            absent = value is False or value is None or value == []
            if has_effect or absent or (default is not None and value == default):
                continue
            words = [name] if name.startswith("--") else []
            if value is not True:
                words += map(str, value if isinstance(value, list) else [value])
            option = " ".join(words)
            raise ConfigError(f"{option}: would have no effect; {remedy}, or leave it out")


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's `main` and exit with its exit code.

    Exceptions are reported as by `told_errors`, with arguments named by their options.
    """
    with as_options(), told_errors():
        code = main()
        sys.stdout.flush()
    sys.exit(code or 0)


@contextmanager
def told_errors() -> Iterator[None]:
    """Report exceptions raised inside as a command line does, and exit.

    A `UserError`, or a package that is not installed, becomes lines on standard error that begin
    with `error:`, and exit code 2. A `RunError` or an interrupt (Ctrl-C) becomes such lines and
    exit code 1. Any other exception keeps its traceback, followed by such lines, and gives exit
    code 1. A reader that stops early (`| head`) is no error.

    Before anything else, a warning is printed if the script runs another checkout's code.

    A tool puts its imports inside too: they fail if packages are missing, and take long enough for
    a Ctrl-C.
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
        # The rest of the buffer has no reader either: keep Python from flushing it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        traceback.print_exc()
        _write_error(f"{type(error).__name__}: {error}")
        sys.exit(1)


def details_of(error: BaseException) -> list[str]:
    """The notes of an error; without any, the exception lacks the attribute."""
    return list(getattr(error, "__notes__", ()))


def _write_error(message: str) -> None:
    """Mark every line: a launcher may interleave the lines of other ranks."""
    sys.stderr.write("".join(f"error: {line}\n" for line in message.splitlines()))
