"""The arguments of `pretrain_bert.py` in a text: alone, behind a launcher, or in a simple script.

A script is read, never run. A variable counts if the script names it once but for `$NAME`: where it
gives it plain text, on lines of its own, outside of branches, loops, functions and subshells, above
the launch. Whatever else an argument needs is refused, with a remedy that works for every script:
let the shell print the line. So there is no need for this to understand more of bash.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping

from megatron_bert.config.errors import ConfigError

PROGRAM = "pretrain_bert.py"

_ECHO = f"put echo before the command that runs {PROGRAM}, run the script, translate what it prints"
_NAME = "[A-Za-z_][A-Za-z0-9_]*"
_OUTPUT = r"\$\((?:[^()]|\([^()]*\))*+\)"
# In which any letter may stand: quotes, an escaped letter, the output of a command.
_QUOTED = (
    rf"""\$'(?:\\[\s\S]|[^'\\])*+'|'[^']*'|"(?:{_OUTPUT}|\\[\s\S]|[^"\\])*+"|\\[\s\S]"""
    rf"|{_OUTPUT}|`[^`]*`"
)
_TEXT = rf"(?:{_QUOTED}|[^\s'\"\\;&|<>()`])"
_VARIABLE = rf"(\")?\$(?:({_NAME}|[\d@])|\{{({_NAME}|\d)(\[@\])?\}})(?(1)\")"

_COMMENT = re.compile(rf"({_QUOTED})|(?<![^\s;&|()])#[^\n]*")
_LINE = re.compile(rf"(?:{_QUOTED}|[^'\"\\`\n])*+(?=\n)")
_ASSIGNMENT = re.compile(
    rf"[ \t]*(?:export[ \t]+)?(?!IFS=)({_NAME})="
    rf"(\((?:{_TEXT}|\s)*+\)|{_TEXT}*+)[ \t]*;?[ \t]*(?=\n)"
)
# Arguments behind the program, and their end: redirections without more of them behind, `;`, `|`.
_LAUNCH = re.compile(
    rf"(?<!\S)(?:(?:\S*/)?{re.escape(PROGRAM)}|\"[^\s\"]*{re.escape(PROGRAM)}\")(?!\S)"
    rf"((?:(?!\s\d?[<>])(?:{_TEXT}|\s))*+)"
    rf"((?:\s*\d?(?:&>>?|>>?[&|]?|<)[ \t]*{_TEXT}++)*+(?:\s|\\\n)*+(?:[;&|)]|\Z))?|{_QUOTED}"
)
_PIECE = re.compile(rf"{_VARIABLE}|{_QUOTED}|[$*?~{{}}\[\];&|<>()`]")
_PIECE_IN_QUOTES = re.compile(rf"{_VARIABLE}|\\[\s\S]|[$`]")
# Letters that stand for themselves wherever they are put in.
_PLAIN = re.compile(r"[\w@%+=:,./ \t\n-]*")
# What begins and what ends a block; no end of a case, whose patterns look like other things.
_BEGIN = re.compile(r"(?<![^\s;&|()!])(?:if|for|while|until|select|case|\{)(?=[\s(]|$)")
_END = re.compile(r"(?:^|;)\s*(?:fi|done|\})(?![^\s;&|)<>])")
# What may set any variable, and behind what lines may be other than they look.
_SETS_ANY = re.compile(r"\b(?:source|eval)\s|(?:^|[;&|({]|\b(?:then|else|do))\s*\.\s")
_UNREADABLE = re.compile(r"(?<!<)<<(?!<)|\bIFS=")


class Script:
    """A text as it is read.

    Args:
        text: Of a script, or what one has printed.
        source: What errors call it.
        given: Values of variables, which count whatever the script says; `"1"` for `$1`.

    Raises:
        ConfigError: A quote does not end.
    """

    def __init__(self, text: str, source: str, given: Mapping[str, str]) -> None:
        self._source, self._given = source, given
        self._text = _COMMENT.sub(lambda found: found[1] or "", text.replace("\r\n", "\n")) + "\n"
        self._assigned: dict[str, tuple[int, str]] = {}
        self._others: list[tuple[int, str]] = []
        # The last line above which no variable is certain.
        self._doubtful = 0
        self._doubts: dict[str, str] = {}
        position, depth, goes_on = 0, 0, False
        while position < len(self._text):
            number = self._number(position)
            found = _ASSIGNMENT.match(self._text, position)
            if found and not depth and not goes_on:
                self._assigned[found[1]] = (number, found[2])
            elif found := found or _LINE.match(self._text, position):
                line = re.sub(_QUOTED, lambda part: " " if part[0] == "\\\n" else "x", found[0])
                depth = max(0, depth + len(_BEGIN.findall(line)) - len(_END.findall(line)))
                if line.count("(") != line.count(")"):
                    depth = sys.maxsize
                if _SETS_ANY.search(line):
                    self._doubtful = max(number, self._doubtful)
                if _UNREADABLE.search(line):
                    self._doubtful = sys.maxsize
                goes_on = line.rstrip().endswith(("&&", "|")) or (goes_on and not line.strip())
                self._others.append((number, found[0]))
            else:
                raise ConfigError(f"{source}, line {number}: a quote does not end; close it")
            position = found.end() + 1

    def arguments(self) -> list[str]:
        """The arguments of the one command that runs the program, or of a text without one.

        Raises:
            ConfigError: One is not certain, or not one command runs the program.
        """
        for name, value in self._given.items():
            if not re.search(rf"\$\{{?{re.escape(name)}(?!\w)", self._text):
                raise ConfigError(
                    f"--variable {name}={value}: {self._source} has no ${name}; correct the name, "
                    "or leave it out"
                )
            if not _PLAIN.fullmatch(value):
                raise ConfigError(f"--variable {name}={value}: not plain text; {_ECHO}")
        runs = [
            (number, run[1], run[2])
            for number, line in self._others
            for run in _LAUNCH.finditer(line)
            if re.search(r"\$|--", run[1] or "")
        ]
        bare = [number for number, line in self._others if line.lstrip().startswith("--")]
        if bare and not runs:
            runs = [(bare[0], self._text, "")]
        elif bare or len(runs) != 1:
            lines = ", ".join(map(str, sorted([*bare, *(run[0] for run in runs)]))) or "none"
            raise ConfigError(
                f"{self._source}: arguments of {PROGRAM} stand in lines {lines}, not in one; leave "
                f"one in the file, or {_ECHO}"
            )
        number, text, end = runs[0]
        try:
            words = self._words(text, number)
            if end is None:
                raise ValueError("end")
        except ValueError as error:
            raise ConfigError(
                f"{self._source}, line {number}: only a shell knows the arguments' {error}; write "
                f"it out, quote it if it is meant as it stands, or {_ECHO}"
            ) from None
        if self._doubts:
            doubts = ", ".join(f"${name} ({where})" for name, where in self._doubts.items())
            options = " ".join(f"--variable {name}=VALUE" for name in self._doubts)
            raise ConfigError(
                f"{self._source}, line {number}: arguments need {doubts}, whose value is not "
                f"certain; give {options}, or {_ECHO}"
            )
        return words

    def _words(self, text: str, number: int) -> list[str]:
        return shlex.split(self._put_in(text, number, _PIECE))

    def _put_in(self, text: str, number: int, pattern: re.Pattern[str]) -> str:
        """A text of a line with the values of its variables, as it would be written in a shell.

        Raises:
            ValueError: What a shell makes of it is not certain.
        """

        def put_in(found: re.Match[str]) -> str:
            piece, quote, name = found[0], found[1], found[2] or found[3]
            if name:
                is_list = found[4] or name == "@"
                values = self._values(name, number)
                if quote and is_list and name in self._given:
                    values = values[0].split()
                if len(values) != 1 and not (is_list and pattern is _PIECE):
                    raise ValueError(piece)
                return shlex.join(values) if quote else " ".join(values)
            if piece == "\\\n":
                return ""
            if piece[0] == '"':
                return f'"{self._put_in(piece[1:-1], number, _PIECE_IN_QUOTES)}"'
            if piece[0] == "'" or (piece[0] == "\\" and piece[1] not in "$`"):
                return piece
            raise ValueError(piece)

        return pattern.sub(put_in, text)

    def _values(self, name: str, number: int) -> list[str]:
        """What a variable holds at a line: a text, or a list; what is not certain is noted."""
        if name in self._given:
            return [self._given[name]]
        named = rf"(?<![\w$/.-])(?<!\$\{{){name}(?!\w)|\$\{{{name}:?="
        places = re.finditer(named, self._text, re.ASCII) if name.isidentifier() else ()
        lines = sorted({self._number(place.start()) for place in places})
        line, text = self._assigned.get(name, (number, ""))
        if lines == [line] and self._doubtful < line < number:
            is_list = text.startswith("(")
            try:
                words = self._words(text[1:-1] if is_list else text, line)
            except ValueError as error:
                words = [f"${error}"]
            if all(map(_PLAIN.fullmatch, words)):
                return words if is_list else [" ".join(words)]
        where = f"line {', '.join(map(str, lines))}" if lines else "set nowhere"
        self._doubts.setdefault(name, where)
        return [""]

    def _number(self, position: int) -> int:
        return self._text.count("\n", 0, position) + 1
