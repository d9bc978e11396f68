"""Where a run's rows come from: its corpora, opened, checked against the tokenizer, and planned."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from _megatron_bert_core import BatchAssembler, IndexedDataset, RowPlan, epoch_rows
from numpy.typing import NDArray

from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.errors import DataError
from megatron_bert.config.schema import Config, Corpus, MlmConfig
from megatron_bert.data.batch import Batch, RowArrays
from megatron_bert.data.blending import blend_warnings, blend_weights
from megatron_bert.data.indexed_dataset import open_dataset, read_dataset_info
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.word_boundaries import word_tables

# Enough to meet an id that a smaller vocabulary lacks, few enough to open a corpus at once. (Every
# id is checked again when its row is assembled.)
_SAMPLED_DOCUMENTS = 1024
_FINGERPRINT_DOCUMENTS = 64


@dataclass(frozen=True)
class RowStage:
    """Rows of one shape.

    Attributes:
        seq_length: slots of each row.
        num_rows: how many there are.
        probability: share of a row's text tokens that are masked.
    """

    seq_length: int
    num_rows: int
    probability: float


class RowSource:
    """Any row of a run, as a function of its number.

    Rows are numbered through all stages. Reading is thread-safe and keeps no state.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        corpora: Sequence[Corpus],
        stages: Sequence[RowStage],
        seed: int,
        held_out_fraction: float = 0.0,
    ) -> None:
        """Open the corpora and plan the rows.

        Args:
            config: its `mlm` section says how rows are masked, but for the stages' probability.
            tokenizer: must be the one that made the corpora.
            corpora: blended by weight or epochs within each stage.
            stages: in the order of the rows' numbers.
            seed: of the order of documents and rows and of the masks.
            held_out_fraction: share of each corpus' documents that no row is made of.

        Raises:
            DataError: a corpus is missing, damaged or empty, or another tokenizer made it.
        """
        self._unit = config.mlm.unit
        self._corpora = tuple(corpora)
        self._stages = tuple(stages)
        self._held_out_fraction = held_out_fraction
        self._datasets = [_open_corpus(corpus.prefix, tokenizer) for corpus in corpora]
        shapes = [(stage.seq_length, stage.num_rows) for stage in stages]
        weights = blend_weights(corpora, self._datasets)
        self._plan = RowPlan(self._datasets, weights, shapes, seed)
        probabilities = [stage.probability for stage in stages]
        self._assembler = _assembler(
            self._datasets, self._plan, tokenizer, config.mlm, probabilities, seed
        )

    @property
    def num_rows(self) -> int:
        """Rows of all stages."""
        return self._plan.num_rows

    def stage_of(self, row: int) -> int:
        """Number, from 0, of the stage that a row of the run belongs to."""
        return self._plan.stage_of(row)[0]

    def row_shape(self, stage: int) -> tuple[int, int]:
        """Slots and masked slots of a stage's rows."""
        seq_length = self._stages[stage].seq_length
        return seq_length, masked_slots(self._stages[stage].probability, self._unit, seq_length)

    def fill(self, rows_B: NDArray[np.int64], arrays: RowArrays) -> int:
        """Assemble rows of one stage into memory of their shape; return their hash.

        Args:
            rows_B: row numbers within the run; -1 makes a surplus row, all padding.
            arrays: host memory for as many rows of the stage's `row_shape`.

        Raises:
            DataError: a row holds an id that the tokenizer lacks.
        """
        try:
            batch_hash = self._assembler.fill(
                rows_B,
                arrays.tokens_BS.numpy(),
                arrays.positions_BS.numpy(),
                arrays.masked_BM.numpy(),
                arrays.labels_BM.numpy(),
                arrays.weights_BM.numpy(),
            )
        except RuntimeError as error:
            raise DataError(
                f"{error}; use the tokenizer that made the dataset, or make the dataset anew"
            ) from error
        arrays.rows_B.numpy()[:] = rows_B
        return batch_hash

    def batch(self, rows_B: NDArray[np.int64], stage: int | None = None) -> Batch:
        """Assemble rows of one stage into memory of their own.

        Args:
            rows_B: row numbers within the run; -1 makes a surplus row, all padding.
            stage: that of the rows; by default that of the last of them in number (of row 0, if
                all are surplus).

        Raises:
            DataError: a row holds an id that the tokenizer lacks.
        """
        if stage is None:
            stage = self.stage_of(int(max(rows_B.max(initial=0), 0)))
        arrays = RowArrays.empty(len(rows_B), *self.row_shape(stage))
        return Batch.of(arrays, self.fill(rows_B, arrays))

    def describe(self) -> list[str]:
        """Lines on each corpus: documents, tokens, and how many epochs the run reads."""
        return [
            f"{corpus.prefix}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens, "
            f"{_share(corpus)}, read {epochs:.3f} times"
            for corpus, dataset, epochs in zip(
                self._corpora, self._datasets, self._plan.epochs(), strict=True
            )
        ]

    def warnings(self) -> list[str]:
        """What the user should know about how often the run reads each corpus."""
        return blend_warnings(self._corpora, self._plan.epochs())

    def fingerprint(self) -> list[str]:
        """For each corpus a line that changes when its content does, wherever its files lie."""
        return [_fingerprint(dataset) for dataset in self._datasets]


def training_source(config: Config, tokenizer: Tokenizer) -> RowSource:
    """Rows of the whole curriculum.

    Raises:
        DataError: as `RowSource`.
    """
    stages = [
        RowStage(span.seq_length, span.num_rows, span.probability)
        for span in Curriculum(config).spans
    ]
    return RowSource(
        config,
        tokenizer,
        config.data.train,
        stages,
        config.run.seed,
        config.data.held_out_fraction,
    )


def validation_source(
    config: Config, tokenizer: Tokenizer, corpus: Corpus, seq_length: int, probability: float
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
    stage = RowStage(seq_length, rows, probability)
    return RowSource(config, tokenizer, [corpus], [stage], config.run.seed)


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
    probabilities: Sequence[float],
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
        probabilities=probabilities,
        unit=mlm.unit,
        max_ngram=mlm.max_ngram,
        mask_ratio=mlm.mask_ratio,
        random_ratio=mlm.random_ratio,
        seed=seed,
    )


def _share(corpus: Corpus) -> str:
    if corpus.epochs is not None:
        return f"{corpus.epochs:g} epochs asked for"
    return f"weight {1.0 if corpus.weight is None else corpus.weight:g}"


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
