"""Arguments as they were given, flag by flag."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_bert.config.errors import ConfigError
from megatron_bert.config.megatron.argument import Argument
from megatron_bert.config.megatron.arity import surely_takes_another
from megatron_bert.config.megatron.table import find

T = TypeVar("T")

_FLAG = re.compile(r"--[A-Za-z]")
_OPEN = re.compile(r"[$`]")
# A command's output, or a variable that is cut to shape: no value of a variable replaces it.
_OUTPUT = re.compile(r"\$\((?!\()|`|\$\{\w+[^\w}]")
# `$NAME`, `${NAME}`, `$1`, and inside of `$((...))` without the dollar.
_NAME = re.compile(r"[A-Za-z_]\w*|(?<=\$)\d|(?<=\$\{)\d+", re.ASCII)
# What may be arguments, as it may be any number of words.
_ANY_WORDS = re.compile(r"(?:--)?[$`]")
# `$@` and `$*`, whole or from one on: what the script, or a function in it, is given.
_OWN = re.compile(r"\$(?:[@*]|\{[@*][^}]*\})")
_ARRAY = re.compile(r"\[[@*]\]\}")
_PUT_IN = re.compile(r"\$\{?(\d+|[A-Za-z_]\w*)", re.ASCII)


class Given:
    """The values behind each flag; of a flag given twice the last, as Megatron-LM takes it.

    Attributes:
        values: By the usual name of an argument that has one, else by the flag itself.
        stray: Words that stand behind no flag.
        own: `$@` and the like, which stand for the script's own arguments.

    Raises:
        ConfigError: What is unknown may be arguments.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.values: dict[str, list[str]] = {}
        self.stray: list[str] = []
        self.own: list[str] = []
        unknown: list[str] = []
        flag, into = "", self.stray
        for word in words:
            if not _FLAG.match(word):
                if _OWN.fullmatch(word):
                    self.own.append(word)
                elif _ANY_WORDS.match(word) and not surely_takes_another(flag, into):
                    unknown.append(word)
                else:
                    into.append(word)
                continue
            flag, has_value, value = word.partition("=")
            entry = find(flag)
            exact = entry is not None and flag in entry.flags
            into = self.values[entry.name if entry and exact and _is_one(entry) else flag] = []
            if has_value:
                into.append(value)
        if unknown:
            words = list(dict.fromkeys(unknown))
            raise ConfigError(
                f"arguments {', '.join(words)}: what they hold nobody knows here, as none or not "
                f"all branches of the script set them; give what the run had: {_how_to_give(words)}"
            )

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
            options = " ".join(f"--variable {name}=VALUE" for name in _unknown(value))
            remedy = (
                f"give it: {options}"
                if options
                else "write the number in its place"
                if _OPEN.search(value)
                else "give a number"
            )
            raise ConfigError(f"{flag} {value}: not a number; {remedy}") from None


def _unknown(value: str) -> list[str]:
    """The variables that make a number of a value once they are given."""
    if not _OPEN.search(value) or _OUTPUT.search(value):
        return []
    return list(dict.fromkeys(_NAME.findall(value)))


def _how_to_give(words: Sequence[str]) -> str:
    """How the arguments that words of a script may hold become known."""
    computed: list[str] = []
    names: dict[str, None] = {}
    for word in words:
        plain = _ARRAY.sub("}", word)
        found = [] if _OUTPUT.search(plain) else _PUT_IN.findall(plain)
        names.update(dict.fromkeys(found))
        computed += [] if found else [word]
    ways = []
    if names:
        options = " ".join(f"--variable {name}='...'" for name in names)
        ways.append(f"{options}, or '' where it is empty")
    if computed:
        ways.append(f"written into the script in place of {', '.join(computed)}")
    return "; ".join(ways)


def _is_one(entry: Argument) -> bool:
    """Whether its flags are names of one argument: what sets a key is never a group."""
    return bool(entry.keys)
