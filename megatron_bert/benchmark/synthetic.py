"""Made-up corpora: document lengths of a given mean, and datasets of random tokens with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _megatron_bert_core import BatchAssembler, IndexedDataset, RowPlan
from numpy.typing import NDArray

from megatron_bert.config.schema import MlmConfig
from megatron_bert.data.index_file import write_index
from megatron_bert.data.indexed_dataset import dataset_file

LENGTH_SPREAD = 1.0
"""Standard deviation of the logarithm of a document's length."""

VOCAB_SIZE = 99_574
"""Vocabulary of the LLM-jp tokenizer v3.0, whose first eight ids are special."""

MASK, PAD, CLS, SEP = 3, 4, 5, 6
NUM_SPECIAL = 8
_TOKEN_BYTES = 4

# Numbers drawn at a time, so that no temporary array is as large as a corpus.
_DRAWN_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class DocumentKind:
    """A kind of documents.

    Attributes:
        name: of the kind.
        mean_tokens: average length of a document.
    """

    name: str
    mean_tokens: float


PARAGRAPHS = DocumentKind("paragraphs", 111)
ARTICLES = DocumentKind("articles", 2166)


@dataclass(frozen=True)
class Corpora:
    """Datasets on disk and their weights in a blend.

    Attributes:
        prefixes: of the datasets.
        weights: one per dataset.
        num_ids: all token ids are below it, including those drawn when tokens are masked.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...]
    num_ids: int = VOCAB_SIZE

    def open(self) -> list[IndexedDataset]:
        """Open all of them."""
        return [IndexedDataset(prefix) for prefix in self.prefixes]


def draw_lengths(num_documents: int, mean_tokens: float, seed: int) -> NDArray[np.int32]:
    """Log-normal document lengths, at least 1: int32 [D], without large temporary arrays.

    Args:
        num_documents: D.
        mean_tokens: mean of the lengths.
        seed: the same arguments give the same lengths.
    """
    random = np.random.default_rng(seed)
    mean_of_logarithm = math.log(mean_tokens) - LENGTH_SPREAD**2 / 2
    lengths_D = np.empty(num_documents, dtype=np.int32)
    for begin in range(0, num_documents, _DRAWN_AT_A_TIME):
        some = lengths_D[begin : begin + _DRAWN_AT_A_TIME]
        drawn = random.lognormal(mean_of_logarithm, LENGTH_SPREAD, len(some))
        some[:] = np.maximum(np.rint(drawn), 1)
    return lengths_D


def divide_documents(num_documents: int, weights: Sequence[float]) -> list[int]:
    """Number of documents of each corpus, in proportion to its weight and at least 1."""
    return [max(1, round(num_documents * weight / sum(weights))) for weight in weights]


def write_corpora(
    folder: Path,
    kind: DocumentKind,
    num_tokens: int,
    weights: Sequence[float],
    num_ids: int = VOCAB_SIZE,
) -> Corpora:
    """Write datasets of random tokens, about `num_tokens` in all, in proportion to the weights.

    Raises:
        OSError: the folder cannot be written to.
    """
    prefixes = []
    num_documents = divide_documents(round(num_tokens / kind.mean_tokens), weights)
    for number, documents in enumerate(num_documents):
        prefix = f"{folder}/{kind.name}_{number}"
        lengths_D = draw_lengths(documents, kind.mean_tokens, seed=number)
        total = int(lengths_D.sum(dtype=np.int64))
        _write_tokens(dataset_file(prefix, ".bin"), total, num_ids, seed=number)
        write_index(dataset_file(prefix, ".idx"), _TOKEN_BYTES, lengths_D)
        prefixes.append(prefix)
    return Corpora(tuple(prefixes), tuple(weights), num_ids)


def write_sentences(prefix: str, num_tokens: int, mean_tokens: float, sentences: int) -> int:
    """Write a dataset whose documents have several sentences each, about `num_tokens` in all.

    Args:
        prefix: of its files.
        num_tokens: of all documents.
        mean_tokens: mean length of a sentence.
        sentences: number of sentences per document.

    Returns:
        The number of documents.

    Raises:
        OSError: the files cannot be written.
    """
    num_documents = max(1, round(num_tokens / (mean_tokens * sentences)))
    lengths_N = draw_lengths(num_documents * sentences, mean_tokens, seed=0)
    _write_tokens(
        dataset_file(prefix, ".bin"), int(lengths_N.sum(dtype=np.int64)), VOCAB_SIZE, seed=0
    )
    boundaries_D = np.arange(0, len(lengths_N) + 1, sentences)
    write_index(dataset_file(prefix, ".idx"), _TOKEN_BYTES, lengths_N, boundaries_D)
    return num_documents


def _write_tokens(path: Path, num_tokens: int, num_ids: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        for begin in range(0, num_tokens, _DRAWN_AT_A_TIME):
            size = min(_DRAWN_AT_A_TIME, num_tokens - begin)
            random.integers(NUM_SPECIAL, num_ids, size, dtype=np.int32).tofile(file)


def make_assembler(
    corpora: Corpora,
    datasets: Sequence[IndexedDataset],
    plan: RowPlan,
    mlm: MlmConfig,
    num_stages: int,
) -> BatchAssembler:
    """An assembler over the corpora's datasets, for units that need no word table."""
    no_table = np.empty(0, dtype=np.uint8)
    return BatchAssembler(
        datasets,
        plan,
        cls_id=CLS,
        sep_id=SEP,
        mask_id=MASK,
        pad_id=PAD,
        vocab_size=corpora.num_ids,
        special_ids=np.arange(NUM_SPECIAL, dtype=np.int32),
        first_class=no_table,
        last_class=no_table,
        starts_word=no_table,
        probabilities=[mlm.probability] * num_stages,
        unit=mlm.unit,
        max_ngram=mlm.max_ngram,
        mask_ratio=mlm.mask_ratio,
        random_ratio=mlm.random_ratio,
        seed=0,
    )
