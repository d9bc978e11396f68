"""Where words begin, judging from the pieces alone: tables for whole-word masking.

Japanese has no spaces, so a word is assumed to end where the script changes (東京 | に | タワー)
and where SentencePiece's `▁` marks a space before the piece.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_bert.data.sentencepiece_model import SPACE
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError

# Byte-level BPE's mark of a space, and WordPiece's of a piece inside a word.
_OTHER_MARKS = ("Ġ", "##")

UInt8Array = npt.NDArray[np.uint8]


class CharacterClass(IntEnum):
    """What a word's characters have in common; a change of class is a word boundary."""

    OTHER = 0
    """Byte-fallback pieces, special pieces, spaces, control characters."""
    ALPHANUMERIC = 1
    """Letters of spaced scripts (Latin, Cyrillic, ...) and digits: `GPT4` is one word."""
    HIRAGANA = 2
    KATAKANA = 3
    HAN = 4
    HANGUL = 5
    PUNCTUATION = 6
    """Punctuation and symbols."""


# First code points of ranges and their class; None: the general category decides.
_RANGES: tuple[tuple[int, CharacterClass | None], ...] = (
    (0x0000, None),
    (0x1100, CharacterClass.HANGUL),  # jamo
    (0x1200, None),
    (0x2E80, CharacterClass.HAN),  # radicals
    (0x2FE0, None),
    (0x3005, CharacterClass.HAN),  # 々 〆 〇
    (0x3008, None),
    (0x3021, CharacterClass.HAN),  # Hangzhou numerals
    (0x302A, None),
    (0x3031, CharacterClass.HIRAGANA),  # vertical repeat marks
    (0x3036, None),
    (0x3038, CharacterClass.HAN),
    (0x303C, None),
    (0x3041, CharacterClass.HIRAGANA),
    (0x30A0, None),
    (0x30A1, CharacterClass.KATAKANA),
    (0x30FB, None),  # the middle dot
    (0x30FC, CharacterClass.KATAKANA),  # the long vowel mark
    (0x3100, None),
    (0x3131, CharacterClass.HANGUL),
    (0x3190, None),
    (0x31F0, CharacterClass.KATAKANA),
    (0x3200, None),
    (0x3400, CharacterClass.HAN),
    (0x4DC0, None),
    (0x4E00, CharacterClass.HAN),
    (0xA000, None),
    (0xA960, CharacterClass.HANGUL),
    (0xA980, None),
    (0xAC00, CharacterClass.HANGUL),
    (0xD800, None),
    (0xF900, CharacterClass.HAN),
    (0xFB00, None),
    (0xFF66, CharacterClass.KATAKANA),  # half-width forms
    (0xFFA0, None),
    (0x20000, CharacterClass.HAN),
    (0x40000, None),
)
_STARTS = [start for start, _ in _RANGES]
assert all(low < high for low, high in pairwise(_STARTS))

_CATEGORY_CLASS = {
    "L": CharacterClass.ALPHANUMERIC,
    "M": CharacterClass.ALPHANUMERIC,
    "N": CharacterClass.ALPHANUMERIC,
    "P": CharacterClass.PUNCTUATION,
    "S": CharacterClass.PUNCTUATION,
    "Z": CharacterClass.OTHER,
    "C": CharacterClass.OTHER,
}


@dataclass(frozen=True)
class WordTables:
    """What decides, for each of V ids, whether a word begins there.

    A word begins at a token if its piece starts with `▁`, if its first character is of another
    class than the last character of the token before, or if it follows a special token.

    Attributes:
        first_class: uint8 `[V]`, `CharacterClass` of the piece's first character.
        last_class: uint8 `[V]`, of its last one.
        starts_word: uint8 `[V]`, 1 where the piece starts with `▁`.
    """

    first_class: UInt8Array
    last_class: UInt8Array
    starts_word: UInt8Array

    @classmethod
    def blank(cls, size: int) -> WordTables:
        """All-zero tables of `size` ids, for a caller that does not use them."""
        return cls(*(np.zeros(size, dtype=np.uint8) for _ in range(3)))


def character_class(character: str) -> CharacterClass:
    """Class of one character."""
    by_range = _RANGES[bisect_right(_STARTS, ord(character)) - 1][1]
    if by_range is not None:
        return by_range
    return _CATEGORY_CLASS[unicodedata.category(character)[0]]


def _class_at_end(text: str) -> CharacterClass:
    return CharacterClass.OTHER if text[-1] == SPACE else character_class(text[-1])


def word_mark(tokenizer: Tokenizer) -> Literal["space", "other", "none"]:
    """How most marked pieces show where words begin: by `▁`, in another way, or not at all.

    The majority decides, because any vocabulary can hold a few pieces that look marked: the
    character ▁ itself, or the `##` of a heading.
    """
    special = frozenset(tokenizer.special_ids)
    ordinary = [
        tokenizer.id_to_piece(token)
        for token in range(tokenizer.vocab_size)
        if token not in special
    ]
    by_space = sum(piece.startswith(SPACE) for piece in ordinary)
    # Pieces of # alone are as likely to be text.
    otherwise = sum(piece.startswith(_OTHER_MARKS) and bool(piece.strip("#")) for piece in ordinary)
    if by_space > otherwise:
        return "space"
    return "other" if otherwise else "none"


@lru_cache(maxsize=1)
def word_tables(tokenizer: Tokenizer) -> WordTables:
    """Tables of a tokenizer's V = `vocab_size` pieces, read-only.

    Cached: a run has a row source for the training text and for each held-out corpus and measure,
    but only one tokenizer.

    Raises:
        DataError: the pieces mark words otherwise than by `▁` (byte-level BPE, WordPiece).
    """
    if word_mark(tokenizer) == "other":
        raise DataError(
            f"tokenizer {tokenizer.name} does not mark the beginnings of words by '{SPACE}' as "
            f"SentencePiece does, so whole words cannot be told; set mlm.unit=token or ngram"
        )
    size = tokenizer.vocab_size
    tables = WordTables.blank(size)
    special = frozenset(tokenizer.special_ids)
    for token in range(size):
        if token in special or tokenizer.is_byte(token):
            continue
        piece = tokenizer.id_to_piece(token)
        tables.starts_word[token] = piece.startswith(SPACE)
        text = piece.lstrip(SPACE)
        if text:
            tables.first_class[token] = character_class(text[0])
            tables.last_class[token] = _class_at_end(text)
    for table in (tables.first_class, tables.last_class, tables.starts_word):
        table.flags.writeable = False
    return tables
