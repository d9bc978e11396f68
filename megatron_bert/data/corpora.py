"""The corpora that rows are made of: which documents are read, opened and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
from _megatron_bert_core import DocumentLengths, IndexedDataset, WordStarts

from megatron_bert.config.schema import Config, Corpus
from megatron_bert.data.indexed_dataset import (
    check_counts,
    check_tokenizer,
    dataset_file,
    open_dataset,
    open_word_starts,
    read_dataset_info,
)
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError

# Enough to find an id that a smaller vocabulary lacks, few enough that a corpus opens at once.
# (Every id is checked again when its row is assembled.)
_SAMPLED_DOCUMENTS = 1024
_FINGERPRINT_DOCUMENTS = 64
_FINGERPRINT_BLOCKS = 64
_FINGERPRINT_BLOCK_BYTES = 1 << 14


@dataclass(frozen=True)
class CorpusPart:
    """The documents of a corpus that are read: all, or one side of its held-out split.

    Attributes:
        corpus: as configured.
        held_out_fraction: share of the documents that is held out; 0 if the corpus is not divided.
        held_out: whether this part is the held-out share or the rest.
    """

    corpus: Corpus
    held_out_fraction: float = 0.0
    held_out: bool = False

    @property
    def prefix(self) -> str:
        """Path of the dataset without its suffix, marked if only the held-out part is read."""
        return f"{self.corpus.prefix} (held out)" if self.held_out else self.corpus.prefix


def training_parts(config: Config) -> list[CorpusPart]:
    """What is trained on."""
    fraction = config.data.held_out_fraction
    return [CorpusPart(corpus, fraction) for corpus in config.data.train]


def evaluation_parts(config: Config) -> list[CorpusPart]:
    """What is evaluated: `data.valid`, and what the training corpora hold out."""
    fraction = config.data.held_out_fraction
    parts = [CorpusPart(corpus) for corpus in config.data.valid]
    if fraction:
        parts += [CorpusPart(corpus, fraction, held_out=True) for corpus in config.data.train]
    return parts


def part_names(parts: Sequence[CorpusPart]) -> list[str]:
    """Name each part in metrics: the last part of its prefix, or all of it where two share it."""
    short = [PurePath(part.prefix).name for part in parts]
    return [
        name if short.count(name) == 1 else part.prefix
        for part, name in zip(parts, short, strict=True)
    ]


@dataclass(frozen=True)
class OpenCorpus:
    """A corpus opened for reading.

    Attributes:
        part: which documents are read.
        dataset: all of its documents.
        lengths: lengths of the documents that are read.
        num_documents: number of documents that are read; empty ones are not.
        word_starts: where words begin according to a dictionary; None if there is no `.words` file
            or it is not needed.
    """

    part: CorpusPart
    dataset: IndexedDataset
    lengths: DocumentLengths
    num_documents: int
    word_starts: WordStarts | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents that are read."""
        return self.lengths.num_tokens

    def check_unchanged(self) -> None:
        """Raise `DataError` if a file that is read changed since it was opened."""
        try:
            self.dataset.check_unchanged()
            if self.word_starts is not None:
                self.word_starts.check_unchanged()
        except RuntimeError as error:
            raise DataError(
                f"{error}; rows can no longer be told: put the file back as it was and start the "
                f"job again, or begin a new run with the new data"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """A line that changes when the content does, independent of where the files are.

        It has counts and a digest of evenly spaced documents and blocks of the words: all of a
        large corpus would take minutes. It is computed once, before training: a file that is
        swapped later must not be recorded as what was trained on.
        """
        digest = hashlib.sha256()
        count = min(self.dataset.num_documents, _FINGERPRINT_DOCUMENTS)
        for number in np.linspace(0, self.dataset.num_documents - 1, count, dtype=np.int64):
            tokens = self.dataset.document(int(number))
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        if self.word_starts is not None:
            _add_blocks(digest, dataset_file(self.part.corpus.prefix, ".words"))
        return (
            f"{self.dataset.num_documents} documents, {self.dataset.num_tokens} tokens, "
            f"sample {digest.hexdigest()[:16]}"
        )


def open_corpus(part: CorpusPart, tokenizer: Tokenizer, *, with_words: bool = False) -> OpenCorpus:
    """Open a corpus and check that it can be read with a tokenizer.

    Args:
        part: the corpus, and which of its documents are read.
        tokenizer: must be the one that made the corpus.
        with_words: whether to open `PREFIX.words` too, if it exists.

    Raises:
        DataError: it is missing, damaged or empty, another tokenizer made it, or the held-out
            split leaves no document on the side that is read.
    """
    corpus = _open(part, tokenizer, with_words=with_words)
    if corpus.num_tokens == 0:
        raise DataError(
            f"data.held_out_fraction = {part.held_out_fraction:g} holds out "
            f"{'no' if part.held_out else 'every'} document of "
            f"{part.corpus.prefix} ({corpus.dataset.num_documents} documents); change it, or set "
            f"it to 0 and name held-out text in data.valid"
        )
    return corpus


def open_evaluation_corpora(
    config: Config, tokenizer: Tokenizer
) -> tuple[list[OpenCorpus], list[str]]:
    """Open what is evaluated.

    A training corpus too small to hold anything out is skipped, as long as there is other text to
    evaluate.

    Returns:
        The corpora, and a warning for each one that is skipped.

    Raises:
        DataError: as `open_corpus`, for one corpus; or no corpus holds out anything.
    """
    parts = evaluation_parts(config)
    with_words = config.mlm.unit == "whole_word"
    opened = [_open(part, tokenizer, with_words=with_words) for part in parts]
    kept = [corpus for corpus in opened if corpus.num_tokens]
    if opened and not kept:
        raise DataError(
            f"data.held_out_fraction = {config.data.held_out_fraction:g} holds out no document of "
            f"any training corpus; raise it, or set it to 0 and name held-out text in data.valid"
        )
    return kept, [
        f"{corpus.part.corpus.prefix} is not evaluated: data.held_out_fraction = "
        f"{corpus.part.held_out_fraction:g} holds out none of its documents"
        for corpus in opened
        if not corpus.num_tokens
    ]


def _open(part: CorpusPart, tokenizer: Tokenizer, *, with_words: bool) -> OpenCorpus:
    """As `open_corpus`, but the side that is read may be empty."""
    prefix = part.corpus.prefix
    dataset = open_dataset(prefix)
    if dataset.num_tokens == 0:
        raise DataError(
            f"dataset {prefix} holds no token ({dataset.num_documents} documents); remove it from "
            f"the configuration, or make it from files that hold text"
        )
    _check_made_by(tokenizer, prefix, dataset)
    lengths = DocumentLengths(
        dataset, held_out_fraction=part.held_out_fraction, held_out=part.held_out
    )
    words = None
    if with_words:
        remedy = (
            "make the dataset anew with tools/preprocess_data.py --word-boundaries, or remove the "
            "file: words are then told by the vocabulary"
        )
        words = open_word_starts(prefix, dataset.num_tokens, remedy)
    return OpenCorpus(part, dataset, lengths, lengths.num_nonempty_documents, words)


def _check_made_by(tokenizer: Tokenizer, prefix: str, dataset: IndexedDataset) -> None:
    info = read_dataset_info(prefix)
    if info is not None:
        remedy = (
            "set data.tokenizer to the one that made the dataset (and convert a checkpoint that is "
            "for the other again: tools/convert_checkpoint.py from-hf --tokenizer FILE), or make "
            "the dataset anew"
        )
        check_tokenizer(prefix, info, tokenizer.name, tokenizer.hash, remedy)
        check_counts(prefix, info, dataset, remedy="copy the dataset again, or make it anew")
    largest = dataset.max_token_id(_SAMPLED_DOCUMENTS)
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"dataset {prefix} holds token id {largest}, but tokenizer {tokenizer.name} has only "
            f"{tokenizer.vocab_size} pieces; set data.tokenizer to the one that made the dataset"
        )


def _add_blocks(digest: hashlib._Hash, path: Path) -> None:
    """Add a file's size and evenly spaced blocks of it, including its first and last."""
    size = path.stat().st_size
    last = max(0, size - _FINGERPRINT_BLOCK_BYTES)
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for begin in np.unique(np.linspace(0, last, _FINGERPRINT_BLOCKS, dtype=np.int64)):
            file.seek(int(begin))
            digest.update(file.read(_FINGERPRINT_BLOCK_BYTES))
