"""A shell script's text, cut into the commands that stand in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_bert.config.megatron.shell_here_documents import without_here_documents
from megatron_bert.config.megatron.shell_words import piece_end

_SEPARATORS = ";|&\n"
_REDIRECTION = re.compile(r"\d*[<>].*")
_DECLARED = re.compile(r"(?:export|local|readonly|declare|typeset)\s+(?:-\w+\s+)*")
_BLANKS = re.compile(r"\s*")
_NAME = re.compile(r"([A-Za-z_]\w*)(?:(\+?=)|(?=\s|$))")
# What may stand before a branch's or a function's first command.
_BEFORE = re.compile(
    r"\s*(?:(?P<opening>if|while|until|\{)(?=\s|$)|(?:then|elif|else|do)(?=\s|$)"
    r"|(?:function\s+[\w:.-]+\s*(?:\(\s*\))?|[\w:.-]+\s*\(\s*\))(?=[\s{(]|$))\s*"
)
_OPENING = ("for", "select", "case")
_CLOSING = ("fi", "done", "esac", "}")
# Commands that change variables in ways that are not followed.
_CHANGES = re.compile(
    r"(?:!\s+|[A-Za-z_]\w*=\S*\s+)*(?:"
    r"(?P<named>(?:read|unset|mapfile|readarray|getopts|for(?!\s*\(\()|select|printf\s+-v)\s)"
    r"|for\s*\(\(|\(\(|let\s|(?:local|readonly|declare|typeset)\s+(?:-\w+\s+)*-\w*[in]\w*\s"
    r"|(?P<element>[A-Za-z_]\w*)\[[^\]]*\]\+?=)"
)
_CHANGED = re.compile(
    r"([A-Za-z_]\w*)\s*(?:\+\+|--|(?:[-+*/%&|^]|<<|>>)?=(?!=))|(?:\+\+|--)\s*([A-Za-z_]\w*)"
)
# Longer is no list of words such as `then` and `{`.
_LONGEST_BEFORE = 200
_ANY_NAME = re.compile(r"(?<!\S)[A-Za-z_]\w*(?=\s|$)")


@dataclass(frozen=True)
class Command:
    """A command as it is written.

    Attributes:
        text: without comments, and without what opens a branch before it.
        joint: what stands before it: `&&`, `||`, `|`, or nothing that matters.
        is_nested: whether it stands in a branch, a loop, a function, braces or parentheses.
    """

    text: str
    joint: str
    is_nested: bool


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

    Raises:
        ValueError: a quote does not end.
    """
    return _Cutter().cut(without_here_documents(text, program))


class _Cutter:
    """The state of the cutting: what is open, and what is read of a command."""

    def __init__(self) -> None:
        self._opened: list[str] = []
        self._read: list[str] = []
        self._joint = ""

    def cut(self, text: str) -> Iterator[Command]:
        parentheses, index = 0, 0
        while index < len(text):
            end = piece_end(text, index)
            piece = text[index:end]
            last = self._read[-1] if self._read else " "
            if piece == "#" and last.isspace():
                index = text.find("\n", index)
                if index < 0:
                    break
                continue
            index = end
            if piece == "\\\n":
                piece = " "
            elif piece == "(" and not parentheses and self._is_at_start() and text[end] != "(":
                yield from self._end("")
                self._opened.append("(")
                continue
            elif piece == ")" and not parentheses:
                yield from self._close()
                continue
            elif piece in "()":
                parentheses += 1 if piece == "(" else -1
            elif piece in _SEPARATORS and not parentheses and last not in "<>":
                yield from self._end(piece)
                continue
            self._read.append(piece)
        yield from self._end("")

    def _is_at_start(self) -> bool:
        """Whether a parenthesis would open a group, and not an array or a function's `()`."""
        before = "".join(self._read[:_LONGEST_BEFORE])
        return len(self._read) < _LONGEST_BEFORE and not _past_openings(before)[1].strip()

    def _close(self) -> Iterator[Command]:
        """A parenthesis of none that is open in the command: a group's, or behind a pattern."""
        if self._opened[-1:] == ["case"]:
            self._read.clear()
            return
        yield from self._end("")
        if self._opened[-1:] == ["("]:
            self._opened.pop()
            yield Command(")", "", bool(self._opened))

    def _end(self, separator: str) -> Iterator[Command]:
        text = "".join(self._read).strip()
        joint = "" if text else self._joint
        before = self._joint
        # `a && b` over two lines is still one.
        is_open = separator in "\n" and joint in ("&&", "||", "|")
        self._joint = joint + separator if separator in ("|", "&") else joint if is_open else ""
        self._read.clear()
        opened, text = _past_openings(text)
        self._opened += opened
        if not text:
            return
        word = text.split(None, 1)[0]
        if word in _OPENING or word.startswith("for(("):
            self._opened.append(word)
        elif word in _CLOSING and self._opened:
            self._opened.pop()
        yield Command(text, before, bool(self._opened))


def _past_openings(text: str) -> tuple[list[str], str]:
    """What is opened before a command's first word, and the command."""
    opened, index = [], 0
    while before := _BEFORE.match(text, index):
        opened += [before["opening"]] if before["opening"] else []
        index = before.end()
    return opened, text[index:]


def assignments(command: str) -> list[Assignment]:
    """The assignments of a command that has nothing else; of `A=1 torchrun ...`, none."""
    declared = _DECLARED.match(command)
    index = declared.end() if declared else 0
    found = []
    while index < len(command) and not _REDIRECTION.match(command, index):
        name = _NAME.match(command, index)
        if name is None or not (name[2] or declared):
            return []
        end = _end_of_word(command, name.end())
        if name[2]:
            found.append(Assignment(name[1], name[2] == "+=", command[name.end() : end]))
        blanks = _BLANKS.match(command, end)
        index = blanks.end() if blanks else end
    return found


def changed_names(command: str) -> list[str]:
    """The variables that a command changes to what is not followed: `read A`, `((A++))`, ..."""
    change = _CHANGES.match(command)
    if change is None:
        return []
    if change["element"]:
        return [change["element"]]
    rest = command[change.end() :]
    if change["named"]:
        names = _ANY_NAME.findall(rest)
        return names[:1] if change["named"].strip() in ("for", "select") else names
    return [name or counted for name, counted in _CHANGED.findall(rest)]


def is_redirection(word: str) -> bool:
    """Whether a command's arguments end before this word."""
    return _REDIRECTION.fullmatch(word) is not None


def _end_of_word(text: str, start: int) -> int:
    """Where blanks follow that are neither quoted nor in parentheses."""
    depth, index = 0, start
    while index < len(text):
        letter = text[index]
        if letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter.isspace() and depth <= 0:
            break
        index = piece_end(text, index)
    return index
