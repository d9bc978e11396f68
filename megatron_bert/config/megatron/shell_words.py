"""The words of a shell's command, with what is quoted of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

_PLAIN = re.compile(r"[^\\$`'\"\s]+")
_PLAIN_IN_QUOTES = re.compile(r"[^\\$`]+")
_SHOWN = 60
_CLOSING = {"$(": ")", "${": "}", "`": "`", '"': '"'}


class Kind(Enum):
    """What the shell does with a part of a word."""

    LITERAL = "stays as it is"
    QUOTED = "variables are put in"
    BARE = "variables are put in and split at blanks"
    COMMAND = "its output is put in: `$(...)`, `$((...))`, backquotes"


@dataclass
class Part:
    """A part of a word."""

    kind: Kind
    text: str


def piece_end(text: str, start: int, *, in_quotes: bool = False) -> int:
    """Behind the quoted text, the `$(...)` or `${...}`, or else the letter that begins at `start`.

    Args:
        text: of a script.
        start: where none of these is open.
        in_quotes: whether the text stands between double quotes.

    Raises:
        ValueError: nothing closes it.
    """
    closing: list[str] = []
    index = start
    while index < len(text):
        letter = text[index]
        inside = closing[-1] if closing else ""
        two = text[index : index + 2]
        if letter == inside:
            closing.pop()
        elif inside == "'":
            pass
        elif letter == "\\":
            index += 1
        elif two in _CLOSING:
            closing.append(_CLOSING[two])
            index += 1
        elif letter in _CLOSING:
            closing.append(_CLOSING[letter])
        elif letter == "'" and not (
            inside == '"' or (inside == "}" and (in_quotes or '"' in closing))
        ):
            # It is an apostrophe in "it's", and in "${NAME:-it's}" too.
            closing.append("'")
        elif letter == "(" and inside == ")":
            closing.append(")")
        index += 1
        if not closing:
            return min(index, len(text))
    shown = text[start : start + _SHOWN].split("\n", 1)[0]
    raise ValueError(f"{shown}: No closing quotation")


def split_words(text: str) -> list[list[Part]]:
    """Split a command at its blanks; each word in parts.

    Raises:
        ValueError: a quote does not end.
    """
    words: list[list[Part]] = []
    is_open = False
    index = 0
    while index < len(text):
        plain = _PLAIN.match(text, index)
        end = plain.end() if plain else piece_end(text, index)
        piece = text[index:end]
        index = end
        if piece.isspace() or piece == "\\\n":
            is_open = False
            continue
        if not is_open:
            words.append([])
            is_open = True
        for part in _parts(piece):
            _append(words[-1], part)
    return words


def quoted_parts(text: str) -> Iterator[Part]:
    """What stands between double quotes.

    Raises:
        ValueError: nothing closes a `$(...)` or `${...}`.
    """
    index = 0
    while index < len(text):
        plain = _PLAIN_IN_QUOTES.match(text, index)
        end = plain.end() if plain else piece_end(text, index, in_quotes=True)
        piece = text[index:end]
        index = end
        if piece == "\\\n":
            continue
        if piece[0] == "\\":
            yield Part(Kind.LITERAL, piece[1:] if piece[1:] in ("$", "`", '"', "\\") else piece)
        else:
            yield Part(Kind.COMMAND if piece.startswith(("$(", "`")) else Kind.QUOTED, piece)


def _parts(piece: str) -> Iterator[Part]:
    match piece[0]:
        case "'":
            yield Part(Kind.LITERAL, piece[1:-1])
        case '"':
            yield Part(Kind.QUOTED, "")
            yield from quoted_parts(piece[1:-1])
        case "\\":
            yield Part(Kind.LITERAL, piece[1:])
        case _:
            yield Part(Kind.COMMAND if piece.startswith(("$(", "`")) else Kind.BARE, piece)


def _append(word: list[Part], part: Part) -> None:
    """Join parts of one kind, so that `$` and the name behind it stand together."""
    if word and word[-1].kind is part.kind and part.kind is not Kind.COMMAND:
        word[-1].text += part.text
    else:
        word.append(part)
