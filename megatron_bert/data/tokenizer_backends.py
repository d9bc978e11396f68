"""SentencePiece and Hugging Face tokenizers behind one small interface.

Both libraries can turn the literal text `<MASK>` into the mask token: SentencePiece where the
piece is user-defined or an ordinary one, tokenizers where it is an added token or is in the model's
vocabulary. Pretraining text must never do that, so each backend rules it out once, at load, at no
cost to encoding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers
from tokenizers.pre_tokenizers import PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence

from megatron_bert.data.sentencepiece_model import as_control_pieces
from megatron_bert.data.unigram import unigram_encoder
from megatron_bert.errors import DataError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class EncodedTexts(NamedTuple):
    """Concatenated ids of several texts, `[sum(lengths)]`, and the number of ids of each text."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


class Backend(Protocol):
    """What a tokenizer library must offer."""

    pieces: list[str]
    special_ids: frozenset[int]
    unknown_ids: frozenset[int]
    byte_ids: frozenset[int]

    def piece_to_id(self, piece: str) -> int | None:
        """Id of a piece, None where the vocabulary lacks it."""

    def encode(self, texts: list[str]) -> EncodedTexts:
        """Ids of texts, without special tokens."""

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[Int32Array, Int64Array]]:
        """Ids of each text, and their offsets in it, in characters, int64 `[length, 2]`."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


class SentencePieceBackend:
    """A SentencePiece model; guarded pieces become control pieces, which text never matches."""

    def __init__(self, content: bytes, guarded: set[str], path: Path) -> None:
        """Load a serialized model; raises `DataError` naming `path` if it is not one."""
        processor = _load_sentencepiece(content, path)
        named = {i for piece in guarded if (i := _sentencepiece_id(processor, piece)) is not None}
        matchable = {i for i in named if not (processor.is_control(i) or processor.is_unknown(i))}
        if matchable:
            names = {processor.id_to_piece(i) for i in matchable}
            content = as_control_pieces(content, names)
            processor = _load_sentencepiece(content, path)
        self._processor = processor
        everything = list(range(len(processor)))
        self.pieces: list[str] = processor.id_to_piece(everything)
        control = np.array(processor.is_control(everything))
        unknown = np.array(processor.is_unknown(everything))
        byte = np.array(processor.is_byte(everything))
        unused = np.array(processor.is_unused(everything))
        self.special_ids = _numbers(control | unknown)
        self.unknown_ids = _numbers(unknown)
        self.byte_ids = _numbers(byte)
        self._encoder = unigram_encoder(
            content, processor, self.pieces, ~(control | unknown | byte | unused)
        )

    def piece_to_id(self, piece: str) -> int | None:
        """Id of a piece, None where the vocabulary lacks it."""
        return _sentencepiece_id(self._processor, piece)

    def encode(self, texts: list[str]) -> EncodedTexts:
        """Ids of texts, on the calling thread, without the GIL."""
        if self._encoder is not None:
            return EncodedTexts(*self._encoder.encode(texts))
        return _joined(self._processor.encode(texts, out_type="numpy", num_threads=1))

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[Int32Array, Int64Array]]:
        """Ids and offsets of each text, on the calling thread."""
        encoded = self._processor.encode(texts, out_type="offset_mapping", num_threads=1)
        return [_as_arrays(text["ids"], text["offsets"]) for text in encoded]

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        text: str = self._processor.decode(ids)
        return text


def _load_sentencepiece(content: bytes, path: Path) -> Any:
    # An empty proto would leave a processor without a model, which SentencePiece allows.
    if not content:
        raise DataError(f"tokenizer {path} is empty; copy it again")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"tokenizer {path} is not a SentencePiece model, or is damaged; copy it again"
        ) from error


def _sentencepiece_id(processor: Any, piece: str) -> int | None:
    # An absent piece gets the unknown id, so compare the piece of the id.
    number: int = processor.piece_to_id(piece)
    return number if processor.id_to_piece(number) == piece else None


def _numbers(chosen: npt.NDArray[np.bool_]) -> frozenset[int]:
    return frozenset(np.flatnonzero(chosen).tolist())


def _joined(ids: list[npt.NDArray[np.int32]]) -> EncodedTexts:
    lengths = np.array([len(some) for some in ids], dtype=np.int64)
    return EncodedTexts(np.concatenate(ids) if ids else np.empty(0, dtype=np.int32), lengths)


class TokenizersBackend:
    """A `tokenizer.json`; special tokens are neither matched in text nor found by its model."""

    def __init__(self, content: bytes, guarded: set[str], path: Path) -> None:
        """Load a serialized tokenizer; raises `DataError` naming `path` if it is not one."""
        try:
            description = json.loads(content)
            added: list[dict[str, Any]] = description.get("added_tokens") or []
            for token in added:
                token["special"] = token["special"] or token["content"] in guarded
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        # tokenizers raises a bare Exception for a description that it cannot use.
        except Exception as error:
            raise DataError(
                f"tokenizer {path} is not a tokenizer.json of the tokenizers library, or is "
                f"damaged ({error}); copy it again, or give another"
            ) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        special = {token["content"] for token in added if token["special"]}
        special |= {piece for piece in guarded if tokenizer.token_to_id(piece) is not None}
        split_inside_special_tokens(tokenizer, special)
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        # An id that no piece has still needs a row in the embedding table.
        self.pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
        for piece, number in vocabulary.items():
            self.pieces[number] = piece
        unknown = {piece for piece in (_unknown_piece(description),) if piece in vocabulary}
        self.unknown_ids = frozenset(vocabulary[piece] for piece in unknown)
        self.special_ids = frozenset(vocabulary[piece] for piece in special | unknown)
        self.byte_ids = frozenset(
            number for piece, number in vocabulary.items() if _BYTE_PIECE.fullmatch(piece)
        )

    def piece_to_id(self, piece: str) -> int | None:
        """Id of a piece, None where the vocabulary lacks it."""
        return self._tokenizer.token_to_id(piece)

    def encode(self, texts: list[str]) -> EncodedTexts:
        """Ids of texts, without the GIL, on the threads of the tokenizers library."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _joined([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[Int32Array, Int64Array]]:
        """Ids and offsets of each text, on the threads of the tokenizers library."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [_as_arrays(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _as_arrays(ids: list[int], offsets: list[tuple[int, int]]) -> tuple[Int32Array, Int64Array]:
    return (
        np.array(ids, dtype=np.int32),
        np.array(offsets, dtype=np.int64).reshape(len(ids), 2),
    )


def split_inside_special_tokens(tokenizer: tokenizers.Tokenizer, special: set[str]) -> None:
    """Split literal special tokens after their first character, before the model sees them.

    This has no effect while special tokens are matched in text: the library takes them out earlier.

    A converted SentencePiece vocabulary holds the special pieces beside the ordinary ones, and its
    model matches them in raw text; a split after the first character leaves it nothing to match.
    """
    patterns = [
        f"{re.escape(piece[0])}(?={re.escape(piece[1:])})"
        for piece in sorted(special)
        if len(piece) > 1
    ]
    if not patterns:
        return
    cut = Split(tokenizers.Regex("|".join(patterns)), "isolated")
    before: PreTokenizer | None = tokenizer.pre_tokenizer
    # An exported tokenizer has it already; its state is the JSON in the file.
    if before is None or cut.__getstate__() not in before.__getstate__():
        tokenizer.pre_tokenizer = cut if before is None else PreTokenizerSequence([before, cut])


def _unknown_piece(description: dict[str, Any]) -> str | None:
    model = description["model"]
    if isinstance(model.get("unk_id"), int):
        piece: str = model["vocab"][model["unk_id"]][0]
        return piece
    unknown: str | None = model.get("unk_token")
    return unknown
