"""Held-out documents that are also trained on: exact duplicates, by a hash of their tokens.

How well a model predicts a text it was trained on does not tell how well it predicts others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megatron_bert.config.schema import Config
from megatron_bert.data.corpora import (
    OpenCorpus,
    open_corpus,
    open_evaluation_corpora,
    training_parts,
)
from megatron_bert.data.deduplication import hash_documents, hash_texts
from megatron_bert.data.inspection import beginning
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError
from megatron_bert.progress_bar import ProgressBar
from megatron_bert.words import share

# Bounds memory, whatever the corpora.
_DOCUMENTS_AT_A_TIME = 1 << 16
# Empty documents take no place in rows.
_HASH_OF_NOTHING = hash_texts([""])

Int64Array = npt.NDArray[np.int64]


def describe_overlap(config: Config, examples: int) -> Iterator[str]:
    """Yield lines on the documents that held-out and training corpora share.

    Training corpora are read once, from front to back. Only held-out documents are kept in memory:
    33 bytes each, 105 while they are sorted. Documents are equal if their tokens are.

    Args:
        config: of the run; its held-out text is `data.valid` and what `data.held_out_fraction`
            keeps out of training.
        examples: the maximum number of pairs to show.

    Raises:
        DataError: there is no held-out text, or a corpus cannot be read.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer)
    held_out, warnings = open_evaluation_corpora(config, tokenizer)
    if not held_out:
        raise DataError(
            "data.valid = [] and data.held_out_fraction = 0: there is no held-out text to "
            "compare with; set one of them"
        )
    yield from warnings
    known = _HeldOutDocuments(held_out)
    pairs: list[tuple[OpenCorpus, int, int]] = []
    for part in training_parts(config):
        corpus = open_corpus(part, tokenizer)
        copies = 0
        for hashes, numbers in _hashed(corpus):
            which, matches = known.find(hashes)
            copies += len(which)
            some = slice(0, examples - len(pairs))
            pairs += [
                (corpus, number, match)
                for number, match in zip(
                    numbers[which[some]].tolist(), matches[some].tolist(), strict=True
                )
            ]
        yield (
            f"{part.prefix}: {share(copies, corpus.num_documents, 'documents')} stand in "
            "held-out text too"
        )
    yield from known.lines()
    for corpus, number, match in pairs:
        tokens = corpus.dataset.document(number)
        yield (
            f"document {number:,} of {corpus.part.prefix} = {known.name(match)} "
            f"({len(tokens):,} tokens): {beginning(tokens, tokenizer)}"
        )


class _HeldOutDocuments:
    """The documents of held-out corpora, looked up by hash; remembers which were found.

    Documents of all corpora are numbered together, in ascending order of their hashes.
    """

    def __init__(self, corpora: Sequence[OpenCorpus]) -> None:
        self._corpora = corpora
        blocks = [
            (hashes, numbers, np.full(len(numbers), number))
            for number, corpus in enumerate(corpora)
            for hashes, numbers in _hashed(corpus)
        ]
        hashes, numbers, corpus_of = (
            np.concatenate(arrays) for arrays in zip(*blocks, strict=True)
        )
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self._hashes, self._numbers, self._corpus = hashes[order], numbers[order], corpus_of[order]
        self._found = np.zeros(len(order), dtype=np.bool_)

    def find(self, hashes: npt.NDArray[np.uint64]) -> tuple[Int64Array, Int64Array]:
        """Which of the hashes, [n, 2], belong to held-out documents, and to which ones.

        Of several held-out documents with the same 64 high bits only the first is looked at: among
        a million different ones, the probability of such a pair is 3e-8.
        """
        at = np.searchsorted(self._hashes[:, 0], hashes[:, 0])
        at[at == len(self._hashes)] = 0
        (which,) = np.nonzero((self._hashes[at] == hashes).all(axis=1))
        self._found[at[which]] = True
        return which, at[which]

    def lines(self) -> Iterator[str]:
        """Yield for each corpus how many of its documents were found."""
        # Copies within held-out text are adjacent, and only the first of them is ever found.
        is_new = np.ones(len(self._hashes), dtype=np.bool_)
        is_new[1:] = (self._hashes[1:] != self._hashes[:-1]).any(axis=1)
        found = self._found[np.flatnonzero(is_new)[np.cumsum(is_new) - 1]]
        for number, corpus in enumerate(self._corpora):
            in_corpus = self._corpus == number
            yield (
                f"{corpus.part.prefix}: "
                f"{share(int(found[in_corpus].sum()), int(in_corpus.sum()), 'documents')} are "
                "trained on"
            )

    def name(self, match: int) -> str:
        """Name a document by its number within its dataset."""
        corpus = self._corpora[self._corpus[match]]
        return f"document {self._numbers[match]:,} of {corpus.part.prefix}"


def _hashed(corpus: OpenCorpus) -> Iterator[tuple[npt.NDArray[np.uint64], Int64Array]]:
    """Yield hashes, [n, 2], and numbers of the documents that are read, block by block."""
    dataset = corpus.dataset
    num_bytes = dataset.num_tokens * dataset.token_bytes
    with ProgressBar(f"reading {corpus.part.prefix}", num_bytes) as progress:
        for first in range(0, dataset.num_documents, _DOCUMENTS_AT_A_TIME):
            end = min(dataset.num_documents, first + _DOCUMENTS_AT_A_TIME)
            numbers = first + np.flatnonzero(corpus.lengths.on_side(first, end))
            try:
                hashes = hash_documents(dataset, numbers.tolist())
            except RuntimeError as error:
                raise DataError(
                    f"{error}; check the disk, or copy dataset {corpus.part.corpus.prefix} again"
                ) from error
            has_tokens = (hashes != _HASH_OF_NOTHING).any(axis=1)
            yield hashes[has_tokens], numbers[has_tokens]
            # Assumes documents of equal size, which is good enough for a progress bar.
            progress.show(num_bytes * end // dataset.num_documents)
