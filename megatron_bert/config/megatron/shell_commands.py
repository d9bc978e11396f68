"""A shell script's text, cut into the commands that stand in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SEPARATORS = ";|&\n"
_REDIRECTION = re.compile(r"\d*[<>].*")
_DECLARED = re.compile(r"(?:export|local|readonly|declare|typeset)\s+(?:-\w+\s+)*")
_NAME = re.compile(r"([A-Za-z_]\w*)(?:(\+?=)|(?=\s|$))")
# Not `<<<`, and no shift of a number.
_HERE_DOCUMENT = re.compile(r"(?<!<)<<(-?)\s*(['\"\\]?)([A-Za-z_]\w*)['\"]?")


@dataclass(frozen=True)
class Command:
    """A command as it is written.

    Attributes:
        text: without comments and joints of lines.
        joint: what stands before it: `&&`, `||`, or nothing that matters.
    """

    text: str
    joint: str


@dataclass(frozen=True)
class Assignment:
    """`NAME=VALUE`, or `NAME+=VALUE`; the value as it is written."""

    name: str
    is_added: bool
    value: str


def commands(text: str, program: str) -> Iterator[Command]:
    """Cut a script where its commands end.

    Args:
        text: the script.
        program: what is looked for: a here-document that runs it is read as the script it is.
    """
    text = _without_here_documents(text, program).replace("\\\n", " ")
    command, quote, depth, index, joint = "", "", 0, 0, ""
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
                yield Command(command.strip(), joint)
                joint = ""
            # `a && b` over two lines is still one.
            joint = joint + letter if letter in "|&" else joint if joint in ("&&", "||") else ""
            command, letter, depth = "", "", 0
        command += letter
        index += 1
    if command.strip():
        yield Command(command.strip(), joint)


def assignments(command: str) -> list[Assignment]:
    """The assignments of a command that has nothing else; of `A=1 torchrun ...`, none."""
    declared = _DECLARED.match(command)
    rest = command[declared.end() :] if declared else command
    found = []
    while rest and not _REDIRECTION.match(rest):
        name = _NAME.match(rest)
        if name is None or not (name[2] or declared):
            return []
        end = _end_of_word(rest, name.end())
        if name[2]:
            found.append(Assignment(name[1], name[2] == "+=", rest[name.end() : end]))
        rest = rest[end:].lstrip()
    return found


def is_redirection(word: str) -> bool:
    """Whether a command's arguments end before this word."""
    return _REDIRECTION.fullmatch(word) is not None


def _end_of_word(text: str, start: int) -> int:
    """Where blanks follow that are neither quoted nor in parentheses."""
    quote, depth = "", 0
    for index in range(start, len(text)):
        letter = text[index]
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"`":
            quote = letter
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter.isspace() and depth <= 0:
            return index
    return len(text)


def _without_here_documents(text: str, program: str) -> str:
    """Take the texts out that stand in a script, but for those that are scripts of the program."""
    kept: list[str] = []
    lines = text.splitlines()
    while lines:
        line = lines.pop(0)
        kept.append(line)
        begin = _HERE_DOCUMENT.search(line)
        if begin is None or "((" in line or line.lstrip().startswith("#"):
            continue
        ends = [inner.lstrip("\t") if begin[1] else inner for inner in lines]
        if begin[3] not in ends:
            # A text that only looks like one.
            continue
        end = ends.index(begin[3])
        body, lines = lines[:end], lines[end + 1 :]
        if any(program in inner for inner in body):
            # The outer shell takes one backslash away.
            kept += body if begin[2] else [inner.replace("\\$", "$") for inner in body]
    return "\n".join(kept)
