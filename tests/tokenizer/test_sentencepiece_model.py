from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from megatron_bert.data.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Piece,
    as_control_pieces,
    parse_model,
)
from megatron_bert.data.tokenizer_training import Normalization, train_tokenizer


def test_pieces_are_those_that_sentencepiece_reads(tiny_tokenizer_path: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer_path))
    numbers = range(library.vocab_size())
    pieces = parse_model(tiny_tokenizer_path.read_bytes()).pieces
    assert [piece.text for piece in pieces] == [library.id_to_piece(i) for i in numbers]
    assert [piece.score for piece in pieces] == [library.get_score(i) for i in numbers]
    assert [piece.kind == CONTROL for piece in pieces] == [library.is_control(i) for i in numbers]
    assert [piece.kind == BYTE for piece in pieces] == [library.is_byte(i) for i in numbers]
    assert [piece.kind == UNKNOWN for piece in pieces] == [library.is_unknown(i) for i in numbers]


def test_the_settings_of_a_tokenizer_trained_here_are_read(tiny_tokenizer_path: Path) -> None:
    model = parse_model(tiny_tokenizer_path.read_bytes())
    assert model.is_unigram
    assert model.byte_fallback
    assert not model.add_dummy_prefix
    assert not model.remove_extra_whitespaces
    assert model.user_defined_symbols == frozenset()


@pytest.mark.parametrize(("rule", "has_rules"), [("identity", False), ("nmt_nfkc", True)])
def test_only_a_normalization_that_changes_text_has_compiled_rules(
    tiny_texts: list[str], rule: Normalization, has_rules: bool
) -> None:
    model = parse_model(train_tokenizer(tiny_texts, 512, normalization=rule))
    assert bool(model.charsmap) == has_rules


def test_absent_fields_have_the_defaults_of_the_format() -> None:
    only_a_text = b"\x0a\x01a"
    model = parse_model(b"\x0a\x03" + only_a_text + b"\x0a\x00")
    assert model.pieces == (Piece("a", 0.0, NORMAL), Piece("", 0.0, NORMAL))
    assert model.is_unigram
    assert not model.byte_fallback
    assert model.user_defined_symbols == frozenset()
    assert model.charsmap == b""
    assert model.add_dummy_prefix
    assert model.remove_extra_whitespaces


def test_the_last_of_a_repeated_field_counts_and_unknown_fields_are_skipped() -> None:
    # Text "a", type BYTE, type CONTROL; then fields 100 to 102: a varint, 64 and 32 bits.
    piece = b"\x0a\x01a" + b"\x18\x06" + b"\x18\x03"
    piece += b"\xa0\x06\xff\x01" + b"\xa9\x06" + bytes(8) + b"\xb5\x06" + bytes(4)
    (parsed,) = parse_model(b"\x0a" + bytes([len(piece)]) + piece).pieces
    assert parsed == Piece("a", 0.0, CONTROL)


def test_only_the_named_pieces_become_control_pieces(tiny_tokenizer_path: Path) -> None:
    content = tiny_tokenizer_path.read_bytes()
    before = parse_model(content)
    named = {piece.text for piece in before.pieces if piece.kind == NORMAL and piece.text in "猫。"}
    assert named
    changed = as_control_pieces(content, named | {"no such piece"})
    expected = [replace(p, kind=CONTROL) if p.text in named else p for p in before.pieces]
    assert parse_model(changed) == replace(before, pieces=tuple(expected))
    library = sentencepiece.SentencePieceProcessor(model_proto=changed)
    numbers = range(library.vocab_size())
    assert [library.is_control(i) for i in numbers] == [p.kind == CONTROL for p in expected]


def test_a_model_of_which_no_piece_is_named_keeps_its_bytes(tiny_tokenizer_path: Path) -> None:
    content = tiny_tokenizer_path.read_bytes()
    assert as_control_pieces(content, set()) == content
