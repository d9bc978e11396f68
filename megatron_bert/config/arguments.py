"""What its caller calls an argument: `json_key` from Python, `--json-key` on a command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Options that are not the argument's name with dashes: they take values one after the other.
_OPTIONS = {
    "documents": "--input",
    "field_keys": "--field-key",
    "inputs": "--input",
    "languages": "--language",
    "license_id": "--license",
}

_is_command_line = False


@contextmanager
def as_options() -> Iterator[None]:
    """Call arguments by their options inside, in all threads: a command line is their caller."""
    # The process speaks to one person, who started it in one way.
    global _is_command_line
    before, _is_command_line = _is_command_line, True
    try:
        yield
    finally:
        _is_command_line = before


def argument(name: str, value: object = None) -> str:
    """An argument as its caller knows it, for messages.

    Args:
        name: Python's.
        value: to give it; True of an option is its presence. None: no certain one.
    """
    if not _is_command_line:
        return name if value is None else f"{name}={value!r}"
    option = _OPTIONS.get(name) or "--" + name.replace("_", "-")
    return option if value is None or value is True else f"{option} {value}"
