"""What is known of a shell script's variables while it is read, and what they put into words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import TypeAlias

from megatron_bert.config.errors import ConfigError
from megatron_bert.config.megatron.shell_arithmetic import with_results
from megatron_bert.config.megatron.shell_commands import Assignment

# Scalars, which are split where they are used, and arrays.
Value: TypeAlias = str | list[str]

_VARIABLE = re.compile(
    r"\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?\}|\{(\w+):?-([^{}]*)\})",
)


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
        """
        name, value = assignment.name, self.compute(assignment.value)
        self._met[name] = None
        if name in self._given:
            return
        before = self._values.get(name, "") if assignment.is_added else ""
        if not for_certain or value.startswith(("$(", "`")):
            self._values[name] = f"${name}"
        elif value.startswith("("):
            words = self.expand(self.words(value[1:-1]))
            self._values[name] = (self._split(before) if assignment.is_added else []) + words
        else:
            filled = "".join(map(self._fill, self.words(value)))
            self._values[name] = (
                f"{before}{filled}" if isinstance(before, str) else [*before, filled]
            )

    def compute(self, text: str) -> str:
        """Put in the results of arithmetic."""
        return with_results(text, self._number)

    def expand(self, words: list[str]) -> list[str]:
        """Put in the values; a word that is nothing but a variable may become several."""
        expanded = []
        for word in words:
            alone = _VARIABLE.fullmatch(word)
            value = self._get(alone[1] or alone[2] or "") if alone else None
            expanded += [self._fill(word)] if value is None else self._split(value)
        return expanded

    def words(self, text: str) -> list[str]:
        """Split as the shell does.

        Raises:
            ConfigError: a quote does not end.
        """
        try:
            return shlex.split(text)
        except ValueError as error:
            shown = text.strip().splitlines()[0][:60]
            raise ConfigError(f"{self._source}: {shown}: {error}; close the quote") from None

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

    def _get(self, name: str) -> Value | None:
        if name:
            self._met[name] = None
        return self._values.get(name)

    def _number(self, name: str) -> str | None:
        value = self._get(name)
        return value if isinstance(value, str) else None

    def _split(self, value: Value) -> list[str]:
        return self.words(value) if isinstance(value, str) else value

    def _fill(self, word: str) -> str:
        def value(match: re.Match[str]) -> str:
            found = self._get(match[1] or match[2] or match[3])
            if found is None:
                return match[0] if match[4] is None else self._fill(match[4])
            return found if isinstance(found, str) else " ".join(found)

        return _VARIABLE.sub(value, word)
