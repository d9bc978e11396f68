"""The tokenizer: finds special ids by their pieces, and never encodes text as one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_bert.command_line.argument_checks import checked
from megatron_bert.command_line.arguments import argument
from megatron_bert.data.tokenizer_backends import (
    Backend,
    EncodedTexts,
    SentencePieceBackend,
    TokenizersBackend,
)
from megatron_bert.errors import DataError
from megatron_bert.files import StrPath

MASK = "<MASK>"
CLS = "<CLS>"
SEP = "<SEP>"
PAD = "<PAD>"
EOD = "<EOD>"

SPECIAL_PIECES = ("<unk>", "<s>", "</s>", MASK, PAD, CLS, SEP, EOD)
"""All special pieces in LLM-jp's order, so that a tokenizer trained here has its ids 0 to 7."""

_REQUIRED = (MASK, CLS, SEP, PAD)

# BERT's spellings, used if a vocabulary has [MASK] and not <MASK>.
_BERTS = {
    "<unk>": ("[UNK]",),
    "<s>": ("[BOS]",),
    "</s>": ("[EOS]",),
    MASK: ("[MASK]",),
    PAD: ("[PAD]",),
    CLS: ("[CLS]",),
    SEP: ("[SEP]",),
    EOD: ("[EOD]", "<|endoftext|>"),
}

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class Tokenizer:
    """Converts text to token ids and back, with a SentencePiece `.model` or a `tokenizer.json`.

    `Tokenizer.load(PATH)` opens one.

    Special tokens are found by piece, never by number, in one of three spellings: `<MASK>`;
    `<MASK|LLM-jp>`, as in LLM-jp's Hugging Face repositories; `[MASK]`, as in BERT. Text that
    contains such a piece literally is encoded as the characters it is made of. The only special id
    that text can produce is `<unk>`, for characters that a vocabulary without byte fallback does
    not know.

    Attributes:
        name: the file's name.
        hash: SHA-256 of the file's bytes, in hex.
        vocab_size: number of pieces, special ones included.
        mask_id: id of `<MASK>`.
        cls_id: id of `<CLS>`.
        sep_id: id of `<SEP>`.
        pad_id: id of `<PAD>`.
        eod_id: id of `<EOD>`; None for a vocabulary without it, which nothing here needs.
        named_ids: ids of those of `SPECIAL_PIECES` that the vocabulary has, in any spelling.
        special_ids: ids of every special piece (control, unknown and the named ones), ascending.
        never_in_text: the special ids that no text produces: all but `<unk>` of a vocabulary
            without byte fallback.
        unknown_ids: ids that stand for characters that the vocabulary lacks.
        byte_ids: ids of pieces that stand for one raw byte (byte fallback, `<0x0A>`).
    """

    def __init__(self, backend: Backend, path: Path, digest: str) -> None:
        """Wrap the backend that opened `path`; raises `DataError` if a special piece is missing."""
        self._backend = backend
        self.name = path.name
        self.hash = digest
        self.vocab_size = len(backend.pieces)
        berts = _is_berts(backend)
        ids = {piece: _find_piece(backend, piece, berts=berts) for piece in SPECIAL_PIECES}
        missing = [piece for piece in _REQUIRED if ids[piece] is None]
        if missing:
            raise _lacks_pieces(path, missing, berts=berts)
        found = {piece: number for piece, number in ids.items() if number is not None}
        self.named_ids = found
        self.mask_id = found[MASK]
        self.cls_id = found[CLS]
        self.sep_id = found[SEP]
        self.pad_id = found[PAD]
        self.eod_id = found.get(EOD)
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
        kinds: dict[str, type[SentencePieceBackend | TokenizersBackend]] = {
            ".model": SentencePieceBackend,
            ".json": TokenizersBackend,
        }
        if path.suffix not in kinds:
            raise DataError(
                f"tokenizer {path} ends in {path.suffix!r}; give a SentencePiece .model or a "
                f"tokenizer.json"
            )
        kind = kinds[path.suffix]
        backend = kind(content, _guarded(berts=False), path)
        if _is_berts(backend):
            # Elsewhere, BERT's spellings are text like any other.
            backend = kind(content, _guarded(berts=True), path)
        return cls(backend, path, hashlib.sha256(content).hexdigest())

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


def _is_berts(backend: Backend) -> bool:
    """Whether the special pieces have BERT's spellings."""
    (berts_mask,) = _BERTS[MASK]
    return (
        _find_piece(backend, MASK, berts=False) is None
        and backend.piece_to_id(berts_mask) is not None
    )


def _spellings(piece: str, *, berts: bool) -> tuple[str, ...]:
    usual = (piece, f"{piece[:-1]}|LLM-jp>")
    return (*_BERTS[piece], *usual) if berts else usual


def _guarded(*, berts: bool) -> set[str]:
    """The pieces that text must not become."""
    return {spelling for piece in SPECIAL_PIECES for spelling in _spellings(piece, berts=berts)}


def _find_piece(backend: Backend, piece: str, *, berts: bool) -> int | None:
    for spelling in _spellings(piece, berts=berts):
        number = backend.piece_to_id(spelling)
        if number is not None:
            return number
    return None


def _lacks_pieces(path: Path, missing: list[str], *, berts: bool) -> DataError:
    names = ", ".join(_spellings(piece, berts=berts)[0] for piece in missing)
    both = "" if berts else f" (nor BERT's {', '.join(_BERTS[piece][0] for piece in missing)})"
    remedy = (
        "train one with tools/train_tokenizer.py, or add the missing ones to this model as control "
        "symbols"
        if path.suffix == ".model"
        else "if it has them under other names, such as <mask>, rename them in this file wherever "
        "they occur (added_tokens, model.vocab, post_processor) and keep their ids; if not, add "
        "them under added_tokens, for a model that exists already with ids below its vocab_size. "
        "Do so in a copy if others use the file. For a new model, tools/train_tokenizer.py makes "
        "one"
    )
    return DataError(
        f"tokenizer {path} has no special piece {names}{both}, spelled just so; {remedy}"
    )
