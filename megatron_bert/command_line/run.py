"""How a command line ends: errors as lines, and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_bert.command_line.arguments import as_options
from megatron_bert.command_line.checkout import warn_of_other_code
from megatron_bert.errors import RunError, UserError, details_of

EXIT_USER_ERROR = 2


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


def _write_error(message: str) -> None:
    """Mark every line: a launcher may interleave the lines of other ranks."""
    sys.stderr.write("".join(f"error: {line}\n" for line in message.splitlines()))
