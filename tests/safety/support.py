"""Commands called as from the command line, but in this process."""

from __future__ import annotations

import contextlib
import importlib
import io

import pytest

from megatron_bert.command_line.run import EXIT_USER_ERROR, run_cli


def error_of(module: str, *arguments: object) -> str:
    """What a command refuses its arguments with: exit code 2, and lines that begin with error."""
    main = importlib.import_module(module).main
    output = io.StringIO()
    with contextlib.redirect_stderr(output), pytest.raises(SystemExit) as caught:
        run_cli(lambda: main([str(argument) for argument in arguments]))
    errors = [line for line in output.getvalue().splitlines() if line.startswith("error: ")]
    assert caught.value.code == EXIT_USER_ERROR, output.getvalue()
    assert errors, output.getvalue()
    return "\n".join(errors)
