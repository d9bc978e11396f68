"""Arguments as they were given, flag by flag."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_bert.errors import ConfigError
from megatron_bert.translation.argument import Argument
from megatron_bert.translation.table import find

T = TypeVar("T")

_FLAG = re.compile(r"--[A-Za-z]")


class Given:
    """The values that follow each flag; of a flag given twice, the last ones, as in Megatron-LM.

    Attributes:
        values: By the argument's usual name if it has one, else by the flag itself.
        stray: Words that follow no flag.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.values: dict[str, list[str]] = {}
        self.stray: list[str] = []
        into = self.stray
        for word in words:
            if not _FLAG.match(word):
                into.append(word)
                continue
            flag, has_value, value = word.partition("=")
            entry = find(flag)
            exact = entry is not None and flag in entry.flags
            into = self.values[entry.name if entry and exact and _is_one(entry) else flag] = []
            if has_value:
                into.append(value)

    def has(self, flag: str) -> bool:
        """Whether the flag was given."""
        return flag in self.values

    def words(self, flag: str) -> list[str]:
        """All values of a flag; Megatron-LM's default if it was not given."""
        if flag in self.values:
            return self.values[flag]
        entry = find(flag)
        assert entry is not None, f"{flag} is in the table"
        return [] if entry.default is None else [entry.default]

    def read(self, flag: str, read: Callable[[str], T]) -> T:
        """The value of a flag, which must have been given or have a default.

        Raises:
            ConfigError: `read` cannot read it.
        """
        value = " ".join(self.words(flag))
        try:
            return read(value)
        except ValueError:
            raise ConfigError(f"{flag} {value}: not a number; give a number") from None


def number(word: str) -> float | None:
    """A word as a number; None if it is not one."""
    try:
        return float(word)
    except ValueError:
        return None


def _is_one(entry: Argument) -> bool:
    """Whether its flags are names of one argument: entries that set a key are never groups."""
    return bool(entry.keys)
