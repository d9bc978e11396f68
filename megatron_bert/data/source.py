"""Where a run's rows come from: its corpora, opened, checked against the tokenizer, and planned."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from _megatron_bert_core import BatchAssembler, IndexedDataset, RowPlan, epoch_rows
from numpy.typing import NDArray

from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.errors import DataError
from megatron_bert.config.schema import Config, Corpus, MlmConfig
from megatron_bert.data.batch import Batch
from megatron_bert.data.indexed_dataset import open_dataset, read_dataset_info
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.word_boundaries import word_tables

# Enough to meet an id that a smaller vocabulary lacks, few enough to open a corpus at once. (Every
# id is checked again when its row is assembled.)
_SAMPLED_DOCUMENTS = 1024
_FINGERPRINT_DOCUMENTS = 64


class RowSource:
    """Any row of a run, as a function of its number.

    Rows are numbered through all stages. Reading is thread-safe and keeps no state.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        corpora: Sequence[Corpus],
        stages: Sequence[tuple[int, int]],
        seed: int,
    ) -> None:
        """Open the corpora and plan the rows.

        Args:
            config: its `mlm` section says how rows are masked.
            tokenizer: must be the one that made the corpora.
            corpora: blended by weight within each stage.
            stages: (seq_length, rows) of each.
            seed: of the order of documents and rows and of the masks.

        Raises:
            DataError: a corpus is missing, damaged or empty, or another tokenizer made it.
        """
        self._mlm = config.mlm
        self._corpora = tuple(corpora)
        self._stages = tuple(stages)
        self._datasets = [_open_corpus(corpus.prefix, tokenizer) for corpus in corpora]
        weights = [corpus.weight for corpus in corpora]
        self._plan = RowPlan(self._datasets, weights, self._stages, seed)
        self._assembler = _assembler(
            self._datasets, self._plan, tokenizer, config.mlm, len(self._stages), seed
        )

    @property
    def num_rows(self) -> int:
        """Rows of all stages."""
        return self._plan.num_rows

    def seq_length_of(self, row: int) -> int:
        """Slots of a row of the run."""
        stage, _ = self._plan.stage_of(row)
        return self._stages[stage][0]

    def batch(self, rows_B: NDArray[np.int64], seq_length: int | None = None) -> Batch:
        """Assemble rows of one stage.

        Args:
            rows_B: row numbers within the run; -1 makes a surplus row, all padding.
            seq_length: slots of the rows; by default those of the first row that is not surplus
                (of row 0, if all are).

        Raises:
            DataError: a row holds an id that the tokenizer lacks.
        """
        if seq_length is None:
            seq_length = self.seq_length_of(int(max(rows_B.max(initial=0), 0)))
        shape_BS = (len(rows_B), seq_length)
        shape_BM = (len(rows_B), masked_slots(self._mlm, seq_length))
        tokens_BS = torch.empty(shape_BS, dtype=torch.int32)
        positions_BS = torch.empty(shape_BS, dtype=torch.int32)
        masked_BM = torch.empty(shape_BM, dtype=torch.int32)
        labels_BM = torch.empty(shape_BM, dtype=torch.int32)
        weights_BM = torch.empty(shape_BM, dtype=torch.float32)
        try:
            batch_hash = self._assembler.fill(
                rows_B,
                tokens_BS.numpy(),
                positions_BS.numpy(),
                masked_BM.numpy(),
                labels_BM.numpy(),
                weights_BM.numpy(),
            )
        except RuntimeError as error:
            raise DataError(
                f"{error}; use the tokenizer that made the dataset, or make the dataset anew"
            ) from error
        rows = torch.from_numpy(rows_B.copy())
        return Batch(tokens_BS, positions_BS, masked_BM, labels_BM, weights_BM, rows, batch_hash)

    def describe(self) -> list[str]:
        """Lines on each corpus: documents, tokens, and how many epochs the run reads."""
        return [
            f"{corpus.prefix}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens, "
            f"weight {corpus.weight:g}, read {epochs:.3f} times"
            for corpus, dataset, epochs in zip(
                self._corpora, self._datasets, self._plan.epochs(), strict=True
            )
        ]

    def fingerprint(self) -> list[str]:
        """For each corpus a line that changes when its content does, wherever its files lie."""
        return [_fingerprint(dataset) for dataset in self._datasets]


def training_source(config: Config, tokenizer: Tokenizer) -> RowSource:
    """Rows of the whole curriculum.

    Raises:
        DataError: as `RowSource`.
    """
    stages = [
        (stage.seq_length, stage.steps * config.batch.global_size) for stage in config.curriculum
    ]
    return RowSource(config, tokenizer, config.data.train, stages, config.run.seed)


def validation_source(
    config: Config, tokenizer: Tokenizer, corpus: Corpus, seq_length: int
) -> RowSource:
    """Rows that evaluation reads of a held-out corpus: `eval.batches` batches, at most one epoch.

    Raises:
        DataError: as `RowSource`.
    """
    dataset = _open_corpus(corpus.prefix, tokenizer)
    rows = min(
        config.eval.batches * config.batch.global_size,
        epoch_rows(dataset, seq_length, config.run.seed),
    )
    return RowSource(config, tokenizer, [corpus], [(seq_length, rows)], config.run.seed)


def _open_corpus(prefix: str, tokenizer: Tokenizer) -> IndexedDataset:
    dataset = open_dataset(prefix)
    if dataset.num_tokens == 0:
        raise DataError(
            f"dataset {prefix} holds no token ({dataset.num_documents} documents); remove it from "
            f"the configuration, or make it from files that hold text"
        )
    info = read_dataset_info(prefix)
    if info is not None and info.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"dataset {prefix} was made with tokenizer {info.tokenizer_name} of SHA-256 "
            f"{info.tokenizer_hash}, but {tokenizer.name} has {tokenizer.hash}; set data.tokenizer "
            f"to the one that made the dataset, or make the dataset anew"
        )
    largest = dataset.max_token_id(_SAMPLED_DOCUMENTS)
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"dataset {prefix} holds token id {largest}, but tokenizer {tokenizer.name} has only "
            f"{tokenizer.vocab_size} pieces; set data.tokenizer to the one that made the dataset"
        )
    return dataset


def _assembler(
    datasets: Sequence[IndexedDataset],
    plan: RowPlan,
    tokenizer: Tokenizer,
    mlm: MlmConfig,
    num_stages: int,
    seed: int,
) -> BatchAssembler:
    no_table = np.empty(0, dtype=np.uint8)
    first_class, last_class, starts_word = no_table, no_table, no_table
    if mlm.unit == "whole_word":
        words = word_tables(tokenizer)
        first_class, last_class, starts_word = (
            words.first_class,
            words.last_class,
            words.starts_word,
        )
    return BatchAssembler(
        datasets,
        plan,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
        special_ids=np.array(tokenizer.special_ids, dtype=np.int32),
        first_class=first_class,
        last_class=last_class,
        starts_word=starts_word,
        probabilities=[mlm.probability] * num_stages,
        unit=mlm.unit,
        max_ngram=mlm.max_ngram,
        mask_ratio=mlm.mask_ratio,
        random_ratio=mlm.random_ratio,
        seed=seed,
    )


def _fingerprint(dataset: IndexedDataset) -> str:
    """Counts and a digest of evenly spaced documents: all of a large corpus would take minutes."""
    digest = hashlib.sha256()
    count = min(dataset.num_documents, _FINGERPRINT_DOCUMENTS)
    for number in np.linspace(0, dataset.num_documents - 1, count, dtype=np.int64):
        tokens = dataset.document(int(number))
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
    return (
        f"{dataset.num_documents} documents, {dataset.num_tokens} tokens, "
        f"sample {digest.hexdigest()[:16]}"
    )
