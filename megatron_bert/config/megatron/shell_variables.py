"""What is known of a shell script's variables while it is read, and what they put into words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import TypeAlias

from megatron_bert.config.errors import ConfigError
from megatron_bert.config.megatron.shell_arithmetic import with_results
from megatron_bert.config.megatron.shell_commands import Assignment
from megatron_bert.config.megatron.shell_words import (
    Kind,
    Part,
    quoted_parts,
    split_words,
)

# Scalars, which are split where they are used without quotes, and arrays.
Value: TypeAlias = str | list[str]

_VARIABLE = re.compile(
    r"\$(?:(\d|[A-Za-z_]\w*)|\{(\w+)(\[[@*]\])?\}|\{(\w+):?-([^{}]*)\})", re.ASCII
)
_ARRAY = re.compile(r"\$\{\w+\[@\]\}", re.ASCII)
# Between words that have come out of one; no word of a command can hold it.
_BREAK = "\0"


class Variables:
    """The variables of a script.

    Args:
        given: values that the script gets from outside, `"1"` for `$1`; it cannot change them.
        source: what errors call the script.
    """

    def __init__(self, given: Mapping[str, str], source: str) -> None:
        self._given = given
        self._values: dict[str, Value] = dict(given)
        self._source = source
        self._met: dict[str, None] = {}

    def assign(self, assignment: Assignment, *, for_certain: bool) -> None:
        """Take an assignment in.

        Args:
            assignment: of the script.
            for_certain: whether it is made whatever branch is taken; else the value is unknown.

        Raises:
            ValueError: a quote does not end.
        """
        name, value = assignment.name, assignment.value
        before = self._values.get(name, "") if assignment.is_added else ""
        added: Value | None
        if value.startswith("("):
            added = self.words(value[1:-1])
            before = before.split() if isinstance(before, str) else before
        else:
            added = self._scalar(value)
        if not for_certain or added is None:
            self.forget(name)
            return
        self._met[name] = None
        if name in self._given:
            return
        if isinstance(before, str) and isinstance(added, str):
            self._values[name] = before + added
        else:
            self._values[name] = [*before, *([added] if isinstance(added, str) else added)]

    def forget(self, name: str) -> None:
        """Nobody knows a variable's value from here on, unless it is given."""
        self._met[name] = None
        if name not in self._given:
            self._values[name] = f"${name}"

    def words(self, text: str) -> list[str]:
        """Split a command as the shell does, with the values put in.

        Raises:
            ValueError: a quote does not end.
        """
        found: list[str] = []
        for word in split_words(text):
            filled = "".join(map(self._fill, word))
            fields = [field for field in filled.split(_BREAK) if field]
            found += fields or ([""] if _stays_one(word) else [])
        return found

    def check_given(self) -> None:
        """Refuse a value that the script has no use for.

        Raises:
            ConfigError: it never met that variable.
        """
        asked = ", ".join(f"${name}" for name in self._met if name not in self._values)
        for name, value in self._given.items():
            if name not in self._met:
                has = f"; it is given {asked}" if asked else ""
                raise ConfigError(
                    f"--variable {name}={value}: {self._source} has no ${name}{has}; correct the "
                    "name, or leave it out"
                )

    def _scalar(self, text: str) -> str | None:
        """What an assignment gives, which splits nothing; None: a command's output."""
        parts = [part for word in split_words(text) for part in word]
        filled = ""
        for part in parts:
            value = self._fill(part, splits=False)
            if part.kind is Kind.COMMAND and value.startswith(("$(", "`")):
                return None
            filled += value.replace(_BREAK, " ")
        return filled

    def _fill(self, part: Part, *, splits: bool = True) -> str:
        """A part with its values; `_BREAK` where one ends a word."""
        if part.kind is Kind.LITERAL:
            return part.text
        if part.kind is Kind.COMMAND:
            return with_results(part.text, self._number)

        def value(match: re.Match[str]) -> str:
            name = match[1] or match[2] or match[4]
            found = self._get(name)
            if found is None:
                if match[5] is None:
                    return match[0]
                found = self._default(match[5], part.kind)
            elif match[3] and name in self._given:
                # Arrays are given as the words would stand in the script.
                found = shlex.split(self._given[name])
            values = [found] if isinstance(found, str) else found
            if part.kind is Kind.BARE and splits:
                values = [re.sub(r"\s+", _BREAK, value) for value in values]
            return _BREAK.join(values)

        return _VARIABLE.sub(value, part.text)

    def _default(self, text: str, kind: Kind) -> str:
        """What `${NAME:-TEXT}` puts in for a variable that nobody knows."""
        if kind is Kind.BARE:
            return " ".join(self.words(text))
        return "".join(map(self._fill, quoted_parts(text.replace('"', ""))))

    def _get(self, name: str) -> Value | None:
        self._met[name] = None
        return self._values.get(name)

    def _number(self, name: str) -> str | None:
        value = self._get(name)
        return value if isinstance(value, str) else None


def _stays_one(word: list[Part]) -> bool:
    """Whether a word that comes out empty is a word all the same: quoted, and no empty array."""
    if len(word) == 1 and _ARRAY.fullmatch(word[0].text):
        return False
    return any(part.kind in (Kind.LITERAL, Kind.QUOTED) for part in word)
