"""Arguments as they were given, flag by flag."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_bert.config.errors import ConfigError
from megatron_bert.translation.argument import Argument
from megatron_bert.translation.table import find

T = TypeVar("T")

_FLAG = re.compile(r"--[A-Za-z]")


class Given:
    """The values behind each flag; of a flag given twice the last, as Megatron-LM takes it.

    Attributes:
        values: By the usual name of an argument that has one, else by the flag itself.
        stray: Words that stand behind no flag.
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
        """Whether it was given."""
        return flag in self.values

    def words(self, flag: str) -> list[str]:
        """All of its values; Megatron-LM's default where it was not given."""
        if flag in self.values:
            return self.values[flag]
        entry = find(flag)
        assert entry is not None, f"{flag} is in the table"
        return [] if entry.default is None else [entry.default]

    def read(self, flag: str, read: Callable[[str], T]) -> T:
        """Its value, which must have been given or have a default.

        Raises:
            ConfigError: It is of another kind.
        """
        value = " ".join(self.words(flag))
        try:
            return read(value)
        except ValueError:
            raise ConfigError(f"{flag} {value}: not a number; give a number") from None


def number(word: str) -> float | None:
    """A word as a number; None where it is none."""
    try:
        return float(word)
    except ValueError:
        return None


def _is_one(entry: Argument) -> bool:
    """Whether its flags are names of one argument: what sets a key is never a group."""
    return bool(entry.keys)
