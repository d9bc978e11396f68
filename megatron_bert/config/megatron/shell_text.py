"""The arguments of a command in the text of a shell script, which is read and never run.

What such scripts do is understood: assignments, arrays, quotes, comments, lines that go on, and
`$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME[@]}`. Whatever else begins with `$` stays as it
stands, for the user to fill in; so does a variable that a branch or a loop assigns, as nobody
knows which of them would be taken.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import TypeAlias

from megatron_bert.config.errors import ConfigError

COMMAND = "pretrain_bert.py"

_ASSIGNMENT = re.compile(
    r"(?:(?:export|local|readonly|declare(?: -\w+)*)\s+)?([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL
)
_VARIABLE = re.compile(
    r"\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?\}|\{(\w+):?-([^{}]*)\})",
)
_PROGRAM = re.compile(rf"(?:\S*/)?{re.escape(COMMAND)}")
_REDIRECTION = re.compile(r"\d*[<>].*")
# Scalars, which are split where they are used, and arrays.
Known: TypeAlias = dict[str, str | list[str]]
_SEPARATORS = ";|&\n"
_OPENING = ("if", "for", "while", "until", "case", "select")
_CLOSING = ("fi", "done", "esac")
# What may stand before the first command of a branch.
_BRANCH = re.compile(r"(?:(?:then|else|do)\s+|[^\s()'\"]+\)\s*)")


def command_arguments(text: str, source: str, variables: Mapping[str, str]) -> list[str]:
    """The words behind `pretrain_bert.py` in a script, or all words of a bare list of arguments.

    Args:
        text: The script's text, or a list of arguments.
        source: What errors call it.
        variables: Values of variables that the script is given from outside, `"1"` for `$1`.

    Raises:
        ConfigError: There is no such command, more than one, or a quote that does not end.
    """
    known: Known = dict(variables)
    found: list[list[str]] = []
    bare: list[str] = []
    depth = 0
    for line in _commands(text):
        word = line.split(None, 1)[0]
        depth += (word in _OPENING) - (word in _CLOSING)
        command = line if depth == 0 else _BRANCH.sub("", line, count=1)
        assignment = _ASSIGNMENT.fullmatch(command)
        if assignment and _is_whole_assignment(assignment[3], source):
            _assign(assignment, known, variables, source)
            if depth and assignment[1] not in variables:
                known[assignment[1]] = f"${assignment[1]}"
            continue
        words = _expand(_words(command, source), known, source)
        places = [index for index, word in enumerate(words) if _PROGRAM.fullmatch(word)]
        if places:
            found.append(list(takewhile(_is_argument, words[places[-1] + 1 :])))
        elif words and words[0].startswith("--"):
            bare += words
    if len(found) > 1:
        raise ConfigError(
            f"{source}: {len(found)} commands run {COMMAND}; leave one of them in the file"
        )
    if not found and not bare:
        raise ConfigError(
            f"{source}: no command runs {COMMAND}, and no line begins with an argument; give a "
            "script that runs it, or its arguments behind --"
        )
    return found[0] if found else bare


def _is_argument(word: str) -> bool:
    return not _REDIRECTION.fullmatch(word)


def _commands(text: str) -> Iterator[str]:
    """Cut a script where its commands end; comments and joints of lines go."""
    text = text.replace("\\\n", " ")
    command, quote, depth, index = "", "", 0, 0
    while index < len(text):
        letter = text[index]
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (not command or command[-1].isspace()):
            index = (text + "\n").index("\n", index)
            continue
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter in _SEPARATORS and depth <= 0 and command[-1:] != ">":
            if command.strip():
                yield command.strip()
            command, letter, depth = "", "", 0
        command += letter
        index += 1
    if command.strip():
        yield command.strip()


def _is_whole_assignment(value: str, source: str) -> bool:
    """Whether nothing stands behind it: `A=1 torchrun ...` is a command."""
    return value.startswith(("(", "$(")) or len(_words(value, source)) <= 1


def _assign(
    assignment: re.Match[str], known: Known, variables: Mapping[str, str], source: str
) -> None:
    name, added, value = assignment.groups()
    if name in variables:
        return
    before = known.get(name, "") if added else ""
    if value.startswith("("):
        words = _expand(_words(value.strip()[1:-1], source), known, source)
        known[name] = (_as_words(before, source) if added else []) + words
    elif value.startswith("$("):
        known[name] = f"${name}"
    else:
        filled = "".join(_fill(word, known) for word in _words(value, source))
        known[name] = f"{before}{filled}" if isinstance(before, str) else [*before, filled]


def _expand(words: list[str], known: Known, source: str) -> list[str]:
    """Put in the variables' values; a word that is nothing but a variable may become several."""
    expanded = []
    for word in words:
        alone = _VARIABLE.fullmatch(word)
        value = known.get(alone[1] or alone[2] or "") if alone else None
        expanded += [_fill(word, known)] if value is None else _as_words(value, source)
    return expanded


def _as_words(value: str | list[str], source: str) -> list[str]:
    return _words(value, source) if isinstance(value, str) else value


def _fill(word: str, known: Known) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2] or match[3]
        if name not in known:
            return str(match[0] if match[4] is None else match[4])
        found = known[name]
        return found if isinstance(found, str) else " ".join(found)

    return _VARIABLE.sub(value, word)


def _words(text: str, source: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        shown = text.strip().splitlines()[0][:60]
        raise ConfigError(f"{source}: {shown}: {error}; close the quote") from None
