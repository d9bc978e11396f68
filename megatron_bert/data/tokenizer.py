"""The tokenizer: finds special ids by their pieces, and never encodes text as one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_bert.config.argument_checks import checked
from megatron_bert.config.arguments import argument
from megatron_bert.config.errors import DataError
from megatron_bert.data.tokenizer_backends import (
    Backend,
    EncodedTexts,
    SentencePieceBackend,
    TokenizersBackend,
)
from megatron_bert.files import StrPath

MASK = "<MASK>"
CLS = "<CLS>"
SEP = "<SEP>"
PAD = "<PAD>"
EOD = "<EOD>"

SPECIAL_PIECES = ("<unk>", "<s>", "</s>", MASK, PAD, CLS, SEP, EOD)
"""All special pieces in LLM-jp's order, so that a tokenizer trained here has its ids 0 to 7."""

_REQUIRED = (MASK, CLS, SEP, PAD, EOD)

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class Tokenizer:
    """Converts text to token ids and back, with a SentencePiece `.model` or a `tokenizer.json`.

    `Tokenizer.load(PATH)` opens one.

    Special tokens are found by piece, never by number, in the spelling `<MASK>` or, as in LLM-jp's
    Hugging Face repositories, `<MASK|LLM-jp>`. Text that contains such a piece literally is encoded
    as the characters it is made of. The only special id that text can produce is `<unk>`, for
    characters that a vocabulary without byte fallback does not know.

    Attributes:
        name: the file's name.
        hash: SHA-256 of the file's bytes, in hex.
        vocab_size: number of pieces, special ones included.
        mask_id: id of `<MASK>`.
        cls_id: id of `<CLS>`.
        sep_id: id of `<SEP>`.
        pad_id: id of `<PAD>`.
        eod_id: id of `<EOD>`.
        special_ids: ids of every special piece (control, unknown and the five above), ascending.
        never_in_text: the special ids that no text produces: all but `<unk>` of a vocabulary
            without byte fallback.
        unknown_ids: ids that stand for characters that the vocabulary lacks.
        byte_ids: ids of pieces that stand for one raw byte (byte fallback, `<0x0A>`).
    """

    def __init__(self, backend: Backend, name: str, digest: str) -> None:
        """Wrap a backend; raises `DataError` if a required special piece is missing."""
        self._backend = backend
        self.name = name
        self.hash = digest
        self.vocab_size = len(backend.pieces)
        ids = {piece: _find_piece(backend, piece) for piece in SPECIAL_PIECES}
        missing = [piece for piece in _REQUIRED if ids[piece] is None]
        if missing:
            raise DataError(
                f"tokenizer {name} has no special piece {', '.join(missing)}, named just so; "
                "train one with tools/train_tokenizer.py, or add what is missing: to a "
                "SentencePiece model as control symbols, to a tokenizer.json under added_tokens"
            )
        found = {piece: number for piece, number in ids.items() if number is not None}
        self.mask_id = found[MASK]
        self.cls_id = found[CLS]
        self.sep_id = found[SEP]
        self.pad_id = found[PAD]
        self.eod_id = found[EOD]
        self.special_ids = sorted(set(backend.special_ids) | set(found.values()))
        self.unknown_ids = sorted(backend.unknown_ids)
        self.byte_ids = sorted(backend.byte_ids)
        unknown = frozenset() if backend.byte_ids else backend.unknown_ids
        self.never_in_text = [i for i in self.special_ids if i not in unknown]

    @classmethod
    @checked
    def load(cls, path: StrPath) -> Tokenizer:
        """Read a SentencePiece `.model` or a `tokenizer.json`.

        Raises:
            DataError: the file is missing, damaged, of another kind, or lacks a special piece.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except IsADirectoryError as error:
            raise DataError(
                f"tokenizer {path} is a folder; name the file in it (a .model or a tokenizer.json)"
            ) from error
        except OSError as error:
            raise DataError(
                f"cannot read tokenizer {path}: {error.strerror}; give a SentencePiece .model or a "
                f"tokenizer.json, or make one with tools/train_tokenizer.py"
            ) from error
        guarded = {spelling for piece in SPECIAL_PIECES for spelling in _spellings(piece)}
        backend: Backend
        if path.suffix == ".model":
            backend = SentencePieceBackend(content, guarded, path)
        elif path.suffix == ".json":
            backend = TokenizersBackend(content, guarded, path)
        else:
            raise DataError(
                f"tokenizer {path} ends in {path.suffix!r}; give a SentencePiece .model or a "
                f"tokenizer.json"
            )
        return cls(backend, path.name, hashlib.sha256(content).hexdigest())

    @checked
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any special token.

        Raises:
            UserError: the argument is not a list of texts (a bare string would count as a list of
                characters), or a text contains half a surrogate pair.
        """
        for at, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{argument('texts')}[{at}]: {text[error.start]!r} at {error.start} is half a "
                    "character; take it out, e.g. by text.encode(errors='ignore').decode()"
                ) from None
        ids, lengths = self._backend.encode(list(texts))
        return [some.tolist() for some in np.split(ids, np.cumsum(lengths))[:-1]]

    def encode(self, texts: list[str]) -> EncodedTexts:
        """As `encode_batch`, but joined in one array; releases the GIL."""
        return self._backend.encode(texts)

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[Int32Array, Int64Array]]:
        """Ids, int32 `[length]`, and their begins and ends, int64 `[length, 2]`, of each text.

        Offsets count characters of the text as it was given.
        """
        return self._backend.encode_with_offsets(texts)

    @checked
    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sequence of ids; special tokens are left out.

        Raises:
            UserError: not a list of ids in `[0, vocab_size)`.
        """
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            at = next(at for at, token in enumerate(ids) if not 0 <= token < self.vocab_size)
            self._check_id(f"ids[{at}]", ids[at])
        special = self._special_set
        return self._backend.decode([token for token in ids if token not in special])

    @checked
    def id_to_piece(self, token: int) -> str:
        """The piece of an id in `[0, vocab_size)`.

        Raises:
            UserError: the id is out of range.
        """
        self._check_id("token", token)
        return self._backend.pieces[token]

    def is_byte(self, token: int) -> bool:
        """Whether the piece stands for one raw byte (byte fallback, `<0x0A>`)."""
        return token in self._backend.byte_ids

    def find_foreign_id(self, ids_T: npt.NDArray[np.int32]) -> int | None:
        """Index of the first id that no text produces: in `never_in_text`, or without a piece."""
        # Viewed as unsigned, a negative id is larger than any vocabulary.
        foreign_T = ids_T.view(np.uint32) >= self.vocab_size
        if foreign_T.any():
            return int(foreign_T.argmax())
        # These ids are mostly contiguous, so that few other ids have to be looked up one by one.
        lowest, highest = self.never_in_text[0], self.never_in_text[-1]
        near = np.flatnonzero((ids_T >= lowest) & (ids_T <= highest))
        found = near[np.isin(ids_T[near], self.never_in_text)]
        return int(found[0]) if len(found) else None

    def _check_id(self, name: str, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise DataError(
                f"{name} = {token}: {self.name} has no such id; give 0 to {self.vocab_size - 1}"
            )

    @cached_property
    def _special_set(self) -> frozenset[int]:
        return frozenset(self.special_ids)


def _spellings(piece: str) -> tuple[str, str]:
    return piece, f"{piece[:-1]}|LLM-jp>"


def _find_piece(backend: Backend, piece: str) -> int | None:
    for spelling in _spellings(piece):
        number = backend.piece_to_id(spelling)
        if number is not None:
            return number
    return None
