"""Turning raw documents into token ids: what each preprocessing thread does with a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import numpy.typing as npt

from megatron_bert.data.deduplication import hash_texts
from megatron_bert.data.dictionary_words import WordFinder, token_starts
from megatron_bert.data.parsing import LineError, Normalization, OnError, parse_all
from megatron_bert.data.raw_documents import RawBatch, RawDocument
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_backends import EncodedTexts
from megatron_bert.errors import DataError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedBatch:
    """N documents of T tokens in all, and what was left out.

    Attributes:
        tokens_T: token ids of all documents, concatenated.
        lengths_N: tokens of each document; none is empty.
        word_starts_T: which tokens begin a word; None if words are not asked for.
        hashes_N2: hash of each text; None if duplicates are not looked for.
        fields_N: values of each document's fields.
        empty: number of documents without a token.
        duplicates: number of documents that occurred before.
        skipped: errors of the lines that cannot be used.
    """

    tokens_T: Int32Array
    lengths_N: Int64Array
    word_starts_T: BoolArray | None
    hashes_N2: npt.NDArray[np.uint64] | None
    fields_N: list[tuple[str | None, ...]]
    empty: int
    skipped: list[LineError]
    duplicates: int = 0

    def only(self, is_kept_N: BoolArray) -> EncodedBatch:
        """Keep the marked documents and count the others as duplicates."""
        is_kept_T = np.repeat(is_kept_N, self.lengths_N)
        starts_T = self.word_starts_T
        return replace(
            self,
            tokens_T=self.tokens_T[is_kept_T],
            lengths_N=self.lengths_N[is_kept_N],
            word_starts_T=None if starts_T is None else starts_T[is_kept_T],
            hashes_N2=None,
            fields_N=list(compress(self.fields_N, is_kept_N)),
            duplicates=int(np.count_nonzero(~is_kept_N)),
        )


@dataclass(frozen=True)
class Encoder:
    """What threads share to turn documents into tokens.

    Attributes:
        tokenizer: gives the tokens.
        json_key: key of the text.
        field_keys: keys of the fields to be counted.
        normalize: the Unicode normalization of the text.
        deduplicate: whether texts are hashed.
        on_error: what happens at a line that cannot be used.
        words: finds the words; None if they are not asked for.
    """

    tokenizer: Tokenizer
    json_key: str
    field_keys: Sequence[str]
    normalize: Normalization
    deduplicate: bool
    on_error: OnError
    words: WordFinder | None

    @property
    def words_name(self) -> str | None:
        """The dictionary that finds the words."""
        return None if self.words is None else self.words.name

    def encode(self, documents: RawBatch) -> EncodedBatch:
        """Tokenize documents.

        Raises:
            LineError: a line cannot be used and `on_error` is `fail`.
            DataError: the tokenizer gives an id that text must not have.
        """
        texts, fields, skipped, unusable = parse_all(
            documents, self.json_key, self.field_keys, self.normalize, self.on_error
        )
        (tokens_T, lengths), word_starts_T = self._encode_texts(texts)
        if (place := self.tokenizer.find_foreign_id(tokens_T)) is not None:
            usable = [d for number, d in enumerate(documents) if number not in unusable]
            number = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise self._foreign_id(usable[number], int(tokens_T[place]))
        has_tokens = lengths > 0
        written = list(compress(texts, has_tokens)) if self.deduplicate else []
        return EncodedBatch(
            tokens_T=tokens_T,
            lengths_N=lengths[has_tokens],
            word_starts_T=word_starts_T,
            hashes_N2=hash_texts(written) if self.deduplicate else None,
            fields_N=list(compress(fields, has_tokens)) if self.field_keys else [],
            empty=len(texts) - int(np.count_nonzero(has_tokens)),
            skipped=skipped,
        )

    def _encode_texts(self, texts: list[str]) -> tuple[EncodedTexts, BoolArray | None]:
        """Tokens of texts, and which of them begin words."""
        if self.words is None:
            return self.tokenizer.encode(texts), None
        encoded = self.tokenizer.encode_with_offsets(texts)
        starts = [
            token_starts(text, self.words.word_begins(text), offsets)
            for text, (_, offsets) in zip(texts, encoded, strict=True)
        ]
        ids = np.concatenate([np.empty(0, dtype=np.int32), *[tokens for tokens, _ in encoded]])
        lengths = np.array([len(tokens) for tokens, _ in encoded], dtype=np.int64)
        return EncodedTexts(ids, lengths), np.concatenate([np.empty(0, dtype=bool), *starts])

    def _foreign_id(self, document: RawDocument, token: int) -> DataError:
        return DataError(
            f"{document.path}, {document.unit} {document.line}: tokenizer {self.tokenizer.name} "
            f"gives the id {token}, which is special or not below its {self.tokenizer.vocab_size} "
            f"pieces; use another tokenizer, or mend this one"
        )
