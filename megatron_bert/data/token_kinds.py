"""The kind of characters that a token is made of, by which held-out accuracy is broken down."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import numpy as np

from megatron_bert.data.sentencepiece_model import SPACE
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.word_boundaries import (
    CharacterClass,
    UInt8Array,
    character_class,
    word_mark,
)

# What a piece that holds only some of a character's bytes decodes to.
_BROKEN = "\N{REPLACEMENT CHARACTER}"

TOKEN_KINDS = (
    "han", "hiragana", "katakana", "latin", "latin_start", "latin_continued", "digits",
    "punctuation", "mixed", "other",
)  # fmt: skip
"""Kinds of tokens, by their number in `token_kinds`.

A token whose characters are of several kinds (食べ, `B2`) is `mixed`. Raw bytes, special tokens,
bare spaces and all other scripts are `other`. Latin letters are `latin_start` in a piece with
SentencePiece's `▁` and `latin_continued` in one without it; if the tokenizer marks words in
another way they are `latin`. Scripts without spaces are not divided in this way: there the mark
only shows where a sentence begins.
"""

_OF_CLASS = {
    CharacterClass.HAN: "han",
    CharacterClass.HIRAGANA: "hiragana",
    CharacterClass.KATAKANA: "katakana",
    CharacterClass.PUNCTUATION: "punctuation",
}


def token_kinds(tokenizer: Tokenizer) -> UInt8Array:
    """The number of the kind of each of the tokenizer's pieces, uint8 `[vocab_size]`.

    Ids that pad the vocabulary beyond the pieces have no kind: no text, and so no label, has them.
    """
    pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size)]
    marks_words = word_mark(tokenizer) == "space"
    special = frozenset(tokenizer.special_ids)
    kinds = np.full(len(pieces), TOKEN_KINDS.index("other"), dtype=np.uint8)
    for token, piece in enumerate(pieces):
        if token in special or tokenizer.is_byte(token):
            continue
        # Byte-level BPE pieces are not text themselves, and WordPiece marks continuations by ##.
        kind = _kind(piece if marks_words else tokenizer.decode([token]).removeprefix("##"))
        if kind == "latin" and marks_words:
            kind = "latin_start" if piece.startswith(SPACE) else "latin_continued"
        kinds[token] = TOKEN_KINDS.index(kind)
    return kinds


def _kind(text: str) -> str:
    found = {_character_kind(character) for character in text if character not in (SPACE, " ")}
    if len(found) > 1:
        return "mixed"
    return found.pop() if found else "other"


@lru_cache(maxsize=1 << 16)
def _character_kind(character: str) -> str:
    kind = character_class(character)
    if kind is CharacterClass.ALPHANUMERIC:
        if unicodedata.category(character).startswith("N"):
            return "digits"
        return "latin" if "LATIN" in unicodedata.name(character, "") else "other"
    return "other" if character == _BROKEN else _OF_CLASS.get(kind, "other")
