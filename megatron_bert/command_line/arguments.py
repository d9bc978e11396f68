"""An argument's name as its caller knows it: `json_key` in Python, `--json-key` as an option."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Options whose name is not the argument's with dashes: they take several values in turn.
_OPTIONS = {
    "calibration_name": "--calibrate",
    "documents": "--input",
    "field_keys": "--field-key",
    "inputs": "--input",
    "languages": "--language",
    "license_id": "--license",
}

_is_command_line = False


@contextmanager
def as_options() -> Iterator[None]:
    """Name arguments by their command-line options inside this context, in all threads."""
    # Global, because a process reports to one person, who started it in one way.
    global _is_command_line
    before, _is_command_line = _is_command_line, True
    try:
        yield
    finally:
        _is_command_line = before


def argument(name: str, value: object = None) -> str:
    """An argument as its caller knows it, for messages.

    Args:
        name: the argument's name in Python.
        value: the value to give it; True means that an option is present. None: no specific value.
    """
    if not _is_command_line:
        return name if value is None else f"{name}={value!r}"
    option = _OPTIONS.get(name) or "--" + name.replace("_", "-")
    return option if value is None or value is True else f"{option} {value}"
