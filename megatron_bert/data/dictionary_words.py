"""Words according to a Japanese dictionary (MeCab, Sudachi), and the tokens that begin them.

Words are found once, when text is tokenized, and stored beside the tokens as one bit per token
(`P.words`), so that training reads them at no cost.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_bert.errors import DataError

Dictionary = Literal["mecab", "sudachi"]

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_PACKAGES = {
    "mecab": {"fugashi": "fugashi", "unidic_lite": "unidic-lite"},
    "sudachi": {"sudachipy": "sudachipy", "sudachidict_core": "sudachidict_core"},
}
# Sudachi takes at most 49,149 bytes at once, and a character has up to 4.
_SUDACHI_CHARACTERS = 12_000
_BREAK = re.compile(r"[。、！？!?,;：:\s]+")


class WordFinder:
    """Finds where words begin.

    Attributes:
        name: the dictionary's packages with their versions: what the result depends on.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        """Load a dictionary.

        Raises:
            DataError: its packages are not installed.
        """
        packages = _PACKAGES[dictionary]
        try:
            for module in packages:
                importlib.import_module(module)
        except ImportError as error:
            raise DataError(
                f"word boundaries of {dictionary} need packages that are not there ({error}); "
                f"install them: pip install {' '.join(packages.values())}"
            ) from error
        self.name = ", ".join(f"{package} {version(package)}" for package in packages.values())
        self._load = _mecab if dictionary == "mecab" else _sudachi
        # Neither library lets two threads use one analyser.
        self._of_thread = threading.local()

    def word_begins(self, text: str) -> Int64Array:
        """Return the offsets, in characters and ascending, at which words begin."""
        if not hasattr(self._of_thread, "analyse"):
            self._of_thread.analyse = self._load()
        return np.fromiter(self._of_thread.analyse(text), dtype=np.int64)


def token_starts(text: str, word_begins: Int64Array, offsets_N2: Int64Array) -> BoolArray:
    """Return which of a text's N tokens begin a word.

    A token begins a word if a word begins where the token does, leading spaces aside. A token that
    spans the beginning of a word joins that word to the one before. Where several tokens make one
    character, only the first of them can begin a word. A token of only spaces begins a word of its
    own, and the first token always begins a word.

    Args:
        text: what was tokenized.
        word_begins: offsets of the words, in characters.
        offsets_N2: where each token begins and ends, in characters.
    """
    size = len(text)
    is_begin = np.zeros(size + 1, dtype=bool)
    is_begin[word_begins] = True
    is_space = np.fromiter(map(str.isspace, text), dtype=bool, count=size)
    places = np.append(np.where(is_space, size, np.arange(size)), size)
    next_word_place = np.minimum.accumulate(places[::-1])[::-1]
    begins_N, ends_N = offsets_N2[:, 0], offsets_N2[:, 1]
    first_N = np.minimum(next_word_place[begins_N], ends_N)
    starts_N: BoolArray = is_begin[first_N]
    starts_N[1:] &= begins_N[1:] != begins_N[:-1]
    starts_N |= (ends_N > begins_N) & (first_N == ends_N)
    starts_N[:1] = True
    return starts_N


def _mecab() -> Callable[[str], Iterator[int]]:
    tagger: Any = importlib.import_module("fugashi").Tagger()

    def analyse(text: str) -> Iterator[int]:
        end = 0
        # MeCab takes a NUL as the end of the text.
        for word in tagger(text.replace("\0", " ")):
            begin = end + len(word.white_space)
            yield begin
            end = begin + len(word.surface)

    return analyse


def _sudachi() -> Callable[[str], Iterator[int]]:
    sudachi = importlib.import_module("sudachipy")
    dictionary = sudachi.Dictionary()
    # Version 0.7 renamed it.
    make = dictionary.tokenizer if hasattr(dictionary, "tokenizer") else dictionary.create
    tokenizer: Any = make(mode=sudachi.SplitMode.C)

    def analyse(text: str) -> Iterator[int]:
        begin = 0
        for piece in _pieces(text):
            for word in tokenizer.tokenize(piece):
                yield begin + word.begin()
            begin += len(piece)

    return analyse


def _pieces(text: str) -> Iterator[str]:
    """Yield lines; lines too long for Sudachi in parts, cut after a punctuation mark or space."""
    for line in text.splitlines(keepends=True):
        while len(line) > _SUDACHI_CHARACTERS:
            ends = [match.end() for match in _BREAK.finditer(line, 0, _SUDACHI_CHARACTERS)]
            end = ends[-1] if ends else _SUDACHI_CHARACTERS
            yield line[:end]
            line = line[end:]
        yield line
