"""Masked samples made by Megatron-core's BERT dataset, if that package is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.benchmark.process import pin_to_one_core
from megatron_bert.benchmark.synthetic import CLS, MASK, PAD, SEP, VOCAB_SIZE, write_sentences
from megatron_bert.benchmark.timing import time_in_turns
from megatron_bert.config.schema import MlmConfig

# Samples are whole sentences of one document, and a sentence of more than 512 tokens loses its
# whole document: documents of many short sentences fill samples best.
_SENTENCE_TOKENS = 30
_SENTENCES_A_DOCUMENT = 100
_TOKENS_ON_DISK = 1_000_000


@dataclass(frozen=True)
class MegatronCoreFigures:
    """What Megatron-core made on one core, in the shortest repetition.

    Attributes:
        version: of Megatron-core.
        tokens_per_second_per_core: by sample length, without padding.
    """

    version: str
    tokens_per_second_per_core: dict[int, int]


class TableTokenizer:
    """Answers what the dataset asks a tokenizer for, as fast as possible.

    Megatron-core's own class for SentencePiece rebuilds `inv_vocab` for every token.
    """

    cls, sep, mask, pad, eod = CLS, SEP, MASK, PAD, VOCAB_SIZE

    def __init__(self) -> None:
        self.inv_vocab = {number: str(number) for number in range(VOCAB_SIZE)}
        self.unique_identifiers = {"class": "TableTokenizer"}


def is_installed() -> bool:
    """Whether Megatron-core can be imported."""
    return all(importlib.util.find_spec(name) for name in ("megatron", "megatron.core"))


def measure_megatron_core(
    folder: Path, seq_lengths: Sequence[int], num_tokens: int, repetitions: int
) -> MegatronCoreFigures:
    """Make samples in this process, which is pinned to one core from then on.

    Args:
        folder: for the dataset and Megatron-core's caches.
        seq_lengths: lengths of the samples.
        num_tokens: maximum tokens of the samples of each length.
        repetitions: how often each length's samples are made.

    Raises:
        OSError: the folder cannot be written to.
    """
    pin_to_one_core()
    prefix = f"{folder}/sentences"
    documents = write_sentences(prefix, _TOKENS_ON_DISK, _SENTENCE_TOKENS, _SENTENCES_A_DOCUMENT)
    rates = {}
    for seq_length in seq_lengths:
        samples = _Samples(_dataset(prefix, documents, seq_length), num_tokens // seq_length)
        (timing,) = time_in_turns([samples.make], repetitions)
        rates[seq_length] = round(samples.num_tokens / timing.best)
    return MegatronCoreFigures(version("megatron-core"), rates)


class _Samples:
    """Some random samples of a dataset."""

    def __init__(self, dataset: Any, count: int) -> None:
        self._dataset = dataset
        self._numbers = np.random.default_rng(0).permutation(len(dataset))[:count]
        # 1 where there is a token, the id of padding elsewhere.
        self.num_tokens = sum(int((sample["padding_mask"] == 1).sum()) for sample in self.make())

    def make(self) -> list[dict[str, Any]]:
        return [self._dataset[number] for number in self._numbers]


def _dataset(prefix: str, documents: int, seq_length: int) -> Any:
    # Imported here because the package is optional; its own optional parts warn if absent.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.distributed as dist
        from megatron.core.datasets.bert_dataset import (
            BERTMaskedWordPieceDataset,
            BERTMaskedWordPieceDatasetConfig,
        )
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    if not dist.is_initialized():
        dist.init_process_group("gloo", f"file://{prefix}.store", rank=0, world_size=1)
    mlm = MlmConfig()
    config = BERTMaskedWordPieceDatasetConfig(
        random_seed=0,
        sequence_length=seq_length,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=TableTokenizer(),
        path_to_cache=f"{prefix}_cache",
        masking_probability=mlm.probability,
        short_sequence_probability=0.0,
        masking_max_ngram=1,
        masking_do_full_word=False,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        classification_head=False,
    )
    # Requesting one sample makes it index one epoch.
    every_document = np.arange(documents, dtype=np.int32)
    return BERTMaskedWordPieceDataset(
        IndexedDataset(prefix), prefix, every_document, 1, Split.train, config
    )
