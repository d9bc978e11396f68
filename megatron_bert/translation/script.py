"""Finds the arguments of `pretrain_bert.py` in a text: alone, or after the command that runs it.

Of what a shell does, only splitting lines into words and removing quotes is done here. A word that
needs more is refused: a shell can print the line as it runs it.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from megatron_bert.errors import ConfigError

PROGRAM = "pretrain_bert.py"
_FOR_A_SHELL = frozenset("$`;&|<>()*?[]{}~")


class _Word(NamedTuple):
    text: str
    written: str
    line: int
    is_certain: bool


def read_arguments(text: str, source: str) -> list[str]:
    """The arguments in a text; if they follow a command, the text may have other lines too.

    Args:
        text: Arguments alone, or after a command: written by hand, or printed by a script.
        source: Name for error messages: the file's path, or `-` for standard input.

    Raises:
        ConfigError: Only a shell could expand them, or not exactly one command has arguments.
    """
    remedy = (
        f"let a shell do it: put echo before the command that runs {PROGRAM} (before torchrun, "
        "srun or python), take `> FILE` from its end, then: bash "
        f"{shlex.quote('train_bert.sh' if source == '-' else source)} ARGS | "
        "python tools/translate_megatron.py - --output my.yaml"
    )
    lines = [line for line in _lines(text) if line]
    runs = [
        (number, line[place + 1 :])
        for number, line in enumerate(lines, 1)
        for place, (word, behind) in enumerate(pairwise(line))
        if word.text.endswith(PROGRAM) and behind.written.lstrip("'\"").startswith(("--", "$", "`"))
    ]
    if lines and PROGRAM not in text and lines[0][0].text.startswith("--"):
        runs = [(len(lines), [word for line in lines for word in line])]
    # A shell's trace may show a line that its script also prints.
    if len({tuple(word.text for word in words) for _, words in runs}) != 1:
        where = ", ".join(str(words[0].line) for _, words in runs) or "none"
        raise ConfigError(
            f"{source}: arguments of {PROGRAM} stand in lines {where}, not in one; leave those of "
            f"one run in the file, or {remedy}"
        )
    number, words = runs[-1]
    for word in words:
        if not word.is_certain:
            raise ConfigError(
                f"{source}, line {word.line}: only a shell knows what {word.written} stands for; "
                "write it out, leave it out if it is no argument, put it in single quotes if it "
                f"is meant as it stands, or {remedy}"
            )
    if number < len(lines) and lines[number][0].text.startswith("--"):
        word = lines[number][0]
        raise ConfigError(
            f"{source}, line {word.line}: {word.text} stands behind the command's end; put a "
            "backslash at the end of each line before it, and no comment or empty line between"
        )
    return [word.text for word in words]


def _lines(text: str) -> Iterator[list[_Word]]:
    """Yield lines as words; a line that ends in a backslash is joined with the next."""
    for blank in " \t":
        text = text.replace(f"\\\n{blank}", f" \\\n{blank}")
    words: list[_Word] = []
    for number, line in enumerate(text.split("\n"), 1):
        stream = io.StringIO(line)
        lexer = shlex.shlex(stream, posix=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        while (rest := line[stream.tell() :].lstrip(" \t\r")) not in ("", "\\") and rest[0] != "#":
            start = len(line) - len(rest)
            try:
                word = lexer.get_token() or ""
                written = line[start : stream.tell()].rstrip(" \t\r")
                words.append(_Word(word, written, number, _is_certain(written)))
            except ValueError:  # A quote is not closed on its line.
                words.append(_Word(rest, rest, number, is_certain=False))
        if rest != "\\":
            yield words
            words = []
    yield words


def _is_certain(written: str) -> bool:
    """Whether a shell would only remove quotes and backslashes from a word."""
    quote = written[0]
    if quote in "'\"" and written.endswith(quote) and written.count(quote) == 2:
        return quote == "'" or not set(written) & set("$`\\")
    # A backslash that is a word of its own is followed by a blank, and joins no lines.
    return written != "\\" and not _FOR_A_SHELL & set(written)
