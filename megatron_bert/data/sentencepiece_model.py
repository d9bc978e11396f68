"""Reading a SentencePiece `.model`, which is a serialized ModelProto.

The library exposes neither the normaliser's settings nor which pieces are user-defined, and its own
protobuf classes require a narrow range of protobuf versions, while trackers and exporters require
others. The wire format is small: a field is a varint (number << 3 | wire type) and a body
(sentencepiece_model.proto; protobuf's "Encoding" page).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

_VARINT, _FIXED_64, _LENGTH_DELIMITED, _FIXED_32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED_64: 8, _FIXED_32: 4}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""SentencePiece.Type."""
UNIGRAM, BPE = 1, 2
"""TrainerSpec.ModelType."""
SPACE = "▁"
"""What stands for a space in a piece."""

# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _USER_DEFINED_SYMBOLS, _BYTE_FALLBACK = 3, 24, 31, 35
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5

# The type field of a user-defined piece. The same bytes can occur in a piece's text or score.
_AS_USER_DEFINED = bytes([_TYPE << 3 | _VARINT, USER_DEFINED])

_Body: TypeAlias = "int | bytes"


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary: its text, log probability and `SentencePiece.Type`."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceSettings:
    """How a `.model` treats text.

    Attributes:
        is_unigram: whether it is a unigram model.
        is_bpe: whether it is a BPE model (if neither, its pieces are words or characters).
        byte_fallback: unknown characters become byte pieces.
        user_defined_symbols: pieces declared as such when the model was trained.
        has_user_defined_pieces: whether the vocabulary has pieces of that type, which is
            independent of `user_defined_symbols`.
        charsmap: the compiled normalisation rules, empty for `identity`.
        add_dummy_prefix: a space is put before every text (after it: `whitespace_as_suffix`).
        remove_extra_whitespaces: spaces are stripped, and runs of them become one.
        escape_whitespaces: spaces become `▁`.
        whitespace_as_suffix: spaces belong to the word before them.
    """

    is_unigram: bool
    is_bpe: bool
    byte_fallback: bool
    user_defined_symbols: frozenset[str]
    has_user_defined_pieces: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_as_suffix: bool


@dataclass(frozen=True)
class SentencePieceModel(SentencePieceSettings):
    """The content of a `.model`: its settings, and the vocabulary, indexed by id."""

    pieces: tuple[Piece, ...]


def parse_model(content: bytes) -> SentencePieceModel:
    """Parse a serialized ModelProto, which SentencePiece itself must have loaded before."""
    pieces = tuple(
        _parse_piece(_bytes(body)) for number, _, body in _fields(content) if number == _PIECES
    )
    return SentencePieceModel(**vars(parse_settings(content)), pieces=pieces)


def parse_settings(content: bytes) -> SentencePieceSettings:
    """Parse everything but the vocabulary, in a small part of the time of `parse_model`."""
    trainer: dict[int, list[_Body]] = {}
    normalizer: dict[int, list[_Body]] = {}
    end_of_pieces, has_user_defined_pieces = _skip_pieces(content)
    for number, _, body in _fields(content[end_of_pieces:]):
        if number == _TRAINER:
            trainer = _by_number(_bytes(body))
        elif number == _NORMALIZER:
            normalizer = _by_number(_bytes(body))
    model_type = _last(trainer, _MODEL_TYPE, UNIGRAM)
    return SentencePieceSettings(
        is_unigram=model_type == UNIGRAM,
        is_bpe=model_type == BPE,
        byte_fallback=bool(_last(trainer, _BYTE_FALLBACK, 0)),
        user_defined_symbols=frozenset(
            _bytes(symbol).decode() for symbol in trainer.get(_USER_DEFINED_SYMBOLS, [])
        ),
        has_user_defined_pieces=has_user_defined_pieces,
        charsmap=_bytes(_last(normalizer, _CHARSMAP, b"")),
        add_dummy_prefix=bool(_last(normalizer, _ADD_DUMMY_PREFIX, 1)),
        remove_extra_whitespaces=bool(_last(normalizer, _REMOVE_EXTRA_WHITESPACES, 1)),
        escape_whitespaces=bool(_last(normalizer, _ESCAPE_WHITESPACES, 1)),
        whitespace_as_suffix=bool(_last(trainer, _WHITESPACE_AS_SUFFIX, 0)),
    )


def as_control_pieces(content: bytes, names: set[str]) -> bytes:
    """Give the named pieces of a serialized ModelProto the type CONTROL.

    The type is appended: if a field occurs twice, protobuf takes the last one.
    """
    rebuilt = bytearray()
    for number, wire, body in _fields(content):
        data = _bytes(body)  # every field of ModelProto is a message
        if number == _PIECES and _parse_piece(data).text in names:
            data += _varint(_TYPE << 3 | _VARINT) + _varint(CONTROL)
        rebuilt += _varint(number << 3 | wire) + _varint(len(data)) + data
    return bytes(rebuilt)


def _skip_pieces(content: bytes) -> tuple[int, bool]:
    """Where the pieces, the first part of a model, end; and whether one is user-defined."""
    position = 0
    user_defined = False
    candidate = content.find(_AS_USER_DEFINED)
    # Avoids a slice or a call for each piece: there can be hundreds of thousands.
    while position < len(content) and content[position] == _PIECES << 3 | _LENGTH_DELIMITED:
        length = content[position + 1]
        position += 2
        if length >= 0x80:
            length, position = _read_varint(content, position - 1)
        if position <= candidate < position + length:
            piece = _parse_piece(content[position : position + length])
            user_defined |= piece.kind == USER_DEFINED
            candidate = content.find(_AS_USER_DEFINED, position + length)
        position += length
    return position, user_defined


def _parse_piece(message: bytes) -> Piece:
    fields = _by_number(message)
    (score,) = struct.unpack("<f", _bytes(_last(fields, _SCORE, bytes(4))))
    kind = _last(fields, _TYPE, NORMAL)
    assert isinstance(kind, int)
    return Piece(_bytes(_last(fields, _PIECE, b"")).decode(), score, kind)


def _by_number(message: bytes) -> dict[int, list[_Body]]:
    fields: dict[int, list[_Body]] = {}
    for number, _, body in _fields(message):
        fields.setdefault(number, []).append(body)
    return fields


def _last(fields: dict[int, list[_Body]], number: int, default: _Body) -> _Body:
    return fields.get(number, [default])[-1]


def _bytes(body: _Body) -> bytes:
    assert isinstance(body, bytes), "not a field of this type in sentencepiece_model.proto"
    return body


def _fields(message: bytes) -> Iterator[tuple[int, int, _Body]]:
    """Yield number, wire type and body of each field."""
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        wire = tag & 7
        if wire == _VARINT:
            value, position = _read_varint(message, position)
            yield tag >> 3, wire, value
            continue
        length = _FIXED_BYTES.get(wire, 0)
        if wire == _LENGTH_DELIMITED:
            length, position = _read_varint(message, position)
        yield tag >> 3, wire, message[position : position + length]
        position += length


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
