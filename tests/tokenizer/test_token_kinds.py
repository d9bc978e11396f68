"""Tokens are sorted by what their text is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_bert.data.token_kinds import TOKEN_KINDS, token_kinds
from megatron_bert.data.tokenizer import SPECIAL_PIECES, Tokenizer


def _kinds_of(pieces: dict[str, int], path: Path, *, byte_level: bool = False) -> dict[str, str]:
    """Kinds of pieces by a tokenizer.json that has these beside the special ones."""
    special = {piece: number for number, piece in enumerate(SPECIAL_PIECES)}
    vocabulary = special | {piece: number + len(special) for piece, number in pieces.items()}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    if byte_level:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    made.save(str(path))
    tokenizer = Tokenizer.load(path)
    kinds = token_kinds(tokenizer)
    assert {TOKEN_KINDS[kind] for kind in kinds[: len(special)]} == {"other"}
    return {piece: TOKEN_KINDS[kinds[vocabulary[piece]]] for piece in pieces}


def test_a_piece_is_of_the_kind_that_all_its_characters_are_of(tmp_path: Path) -> None:
    expected = {
        "東京々": "han", "▁である": "hiragana", "コーヒー": "katakana", "ｱﾝ": "katakana",
        "▁The": "latin_start", "ing": "latin_continued", "Ｅ": "latin_continued",
        "▁2024": "digits", "①": "digits", "。」": "punctuation", "▁(": "punctuation",
        "食べ": "mixed", "▁GPT4": "mixed", "▁▁": "other", "мир": "other", "한국": "other",
        "<0x41>": "other",
    }  # fmt: skip
    pieces = {piece: number for number, piece in enumerate(expected)}
    assert _kinds_of(pieces, tmp_path / "tokenizer.json") == expected


def test_pieces_of_byte_level_bpe_are_read_as_text_and_mark_no_words(tmp_path: Path) -> None:
    japanese, cut = "æĿ±", "æĿ"  # 東 in the alphabet of bytes, and two thirds of it
    expected = {japanese: "han", cut: "other", "Ġthe": "latin", "ing": "latin", "12": "digits"}
    pieces = {piece: number for number, piece in enumerate(expected)}
    assert _kinds_of(pieces, tmp_path / "tokenizer.json", byte_level=True) == expected


def test_the_mark_of_wordpiece_is_no_part_of_a_piece(tmp_path: Path) -> None:
    expected = {"##ing": "latin", "##3": "digits", "##京": "han", "play": "latin"}
    expected |= {"▁": "other", "##▁": "other"}  # stray: the character itself
    pieces = {piece: number for number, piece in enumerate(expected)}
    assert _kinds_of(pieces, tmp_path / "tokenizer.json") == expected


def test_every_piece_of_a_sentencepiece_model_has_a_kind(tiny_tokenizer: Tokenizer) -> None:
    kinds = token_kinds(tiny_tokenizer)
    assert kinds.shape == (tiny_tokenizer.vocab_size,)
    assert kinds.dtype == np.uint8
    plain = [*tiny_tokenizer.special_ids, *tiny_tokenizer.byte_ids]
    assert {TOKEN_KINDS[kind] for kind in kinds[plain]} == {"other"}
    found = {TOKEN_KINDS[kind] for kind in kinds}
    assert {"han", "hiragana", "katakana", "latin_start", "latin_continued"} < found
    assert "latin" not in found
