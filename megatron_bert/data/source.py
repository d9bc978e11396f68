"""Where a run's rows come from: corpora are opened, checked against the tokenizer and planned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from _megatron_bert_core import BatchAssembler, RowPlan, TokenIdError, epoch_rows
from numpy.typing import NDArray

from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.row_memory import gigabytes, long_run, plan_bytes, room_for_rows
from megatron_bert.config.schema import Config, MlmConfig
from megatron_bert.data.batch import Batch, RowArrays
from megatron_bert.data.blending import blend_warnings, blend_weights
from megatron_bert.data.corpora import CorpusPart, OpenCorpus, open_corpus, training_parts
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.word_boundaries import WordTables, word_tables
from megatron_bert.errors import DataError
from megatron_bert.words import counted, times

logger = logging.getLogger(__name__)

# Some ten million rows are planned a second; a plan that takes noticeably long is logged.
_MANY_ROWS = 10**8


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

    Rows are numbered consecutively across all stages. Reading is thread-safe and keeps no state.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        corpora: Sequence[OpenCorpus],
        stages: Sequence[RowStage],
        seed: int,
    ) -> None:
        """Plan the rows.

        Args:
            config: its `mlm` section says how rows are masked; the probability is the stages'.
            tokenizer: the one that made the corpora.
            corpora: blended by weight or epochs within each stage.
            stages: in the order of the rows' numbers.
            seed: determines the order of documents and rows, and the masks.
        """
        self._unit = config.mlm.unit
        self._stages = tuple(stages)
        self._corpora = tuple(corpora)
        shapes = [(stage.seq_length, stage.num_rows) for stage in stages]
        lengths = [corpus.lengths for corpus in self._corpora]
        self._plan = RowPlan(lengths, blend_weights(self._corpora), shapes, seed)
        probabilities = [stage.probability for stage in stages]
        self._assembler = _assembler(
            self._corpora, self._plan, tokenizer, config.mlm, probabilities, seed
        )

    @property
    def num_rows(self) -> int:
        """Rows of all stages."""
        return self._plan.num_rows

    def check_unchanged(self) -> None:
        """Raise `DataError` if a file of a corpus changed since it was opened.

        Costs a system call per file, which a file server may have to answer, so it is not meant for
        every batch.
        """
        for corpus in self._corpora:
            corpus.check_unchanged()

    def row_shape(self, stage: int) -> tuple[int, int]:
        """Slots and masked slots of a stage's rows."""
        seq_length = self._stages[stage].seq_length
        return seq_length, masked_slots(self._stages[stage].probability, self._unit, seq_length)

    def fill(self, rows_B: NDArray[np.int64], arrays: RowArrays) -> int:
        """Assemble rows of one stage into arrays of their shape; return their hash.

        Args:
            rows_B: row numbers within the run; -1 makes a surplus row, all padding.
            arrays: host memory for as many rows of the stage's `row_shape`.

        Raises:
            DataError: a row holds an id that the tokenizer does not have, or cannot be read.
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
        except TokenIdError as error:
            raise DataError(
                f"{error}; use the tokenizer that made the dataset, or make the dataset anew"
            ) from error
        except RuntimeError as error:
            raise DataError(
                f"{error}; check the disk, put the file back as it was and start the job again"
            ) from error
        arrays.rows_B.numpy()[:] = rows_B
        return batch_hash

    def batch(self, rows_B: NDArray[np.int64], stage: int) -> Batch:
        """Assemble rows of one stage into newly allocated arrays.

        Args:
            rows_B: row numbers within the run; -1 makes a surplus row, all padding.
            stage: number, from 0, of the stage that they belong to.

        Raises:
            DataError: as `fill`.
        """
        arrays = RowArrays.empty(len(rows_B), *self.row_shape(stage))
        return Batch.of(arrays, self.fill(rows_B, arrays))

    def describe(self) -> list[str]:
        """Lines on each corpus: documents, tokens, and how many epochs the run reads."""
        return [
            f"{corpus.part.prefix}: {counted(corpus.num_documents, 'document')}, "
            f"{counted(corpus.num_tokens, 'token')}{_share(corpus.part)}, read {times(epochs)}"
            for corpus, epochs in zip(self._corpora, self._plan.epochs(), strict=True)
        ]

    def warnings(self) -> list[str]:
        """What the user should know about how often the run reads each corpus."""
        return blend_warnings([c.part.corpus for c in self._corpora], self._plan.epochs())

    def fingerprint(self) -> list[str]:
        """For each corpus a line on its content at the first call, wherever its files lie."""
        return [corpus.fingerprint for corpus in self._corpora]


def training_source(config: Config, tokenizer: Tokenizer) -> RowSource:
    """Rows of the whole curriculum.

    Raises:
        DataError: a corpus is missing, damaged or empty, another tokenizer made it, or the plan of
            the run's rows does not fit in memory.
    """
    with_words = config.mlm.unit == "whole_word"
    corpora = [
        open_corpus(part, tokenizer, with_words=with_words) for part in training_parts(config)
    ]
    stages = [
        RowStage(span.seq_length, span.num_rows, span.probability)
        for span in Curriculum(config).spans
    ]
    needed = _plan_bytes(corpora, stages)
    if needed > room_for_rows():
        raise _too_long(config, f"needs {gigabytes(needed)}")
    rows = sum(stage.num_rows for stage in stages)
    if rows >= _MANY_ROWS:
        logger.info("planning %s rows, which takes minutes for every billion", f"{rows:,}")
    try:
        return RowSource(config, tokenizer, corpora, stages, config.run.seed)
    except MemoryError as error:
        raise _too_long(config, f"finds no {gigabytes(needed)}") from error


def _plan_bytes(corpora: Sequence[OpenCorpus], stages: Sequence[RowStage]) -> float:
    """Bytes of the row plan; for a small corpus most of it records where epochs begin."""
    weights = blend_weights(corpora)
    # As in `blend_weights`: a row takes 2 slots for the document that it breaks off.
    slots = sum(stage.num_rows * (stage.seq_length - 2) for stage in stages)
    epochs = sum(
        slots * weight / sum(weights) / (corpus.num_tokens + 2 * corpus.num_documents)
        for weight, corpus in zip(weights, corpora, strict=True)
    )
    return plan_bytes(sum(stage.num_rows for stage in stages), len(corpora), epochs)


def _too_long(config: Config, plan: str) -> DataError:
    return DataError(
        f"{long_run(config)}, whose plan {plan} of memory in each process (half of this job's "
        f"is {gigabytes(room_for_rows())}); use fewer steps, or more text, which is then read less "
        "often"
    )


def validation_source(
    config: Config, tokenizer: Tokenizer, corpus: OpenCorpus, seq_length: int, probability: float
) -> RowSource:
    """Rows of held-out text for evaluation: `eval.batches` batches, at most one epoch."""
    # No corpus has more rows than 2^62; the data core counts them in 64 bits.
    wanted = min(config.eval.batches * config.batch.global_size, 2**62)
    rows = epoch_rows(corpus.lengths, seq_length, config.run.seed, limit=wanted)
    stage = RowStage(seq_length, rows, probability)
    return RowSource(config, tokenizer, [corpus], [stage], config.run.seed)


def _assembler(
    corpora: Sequence[OpenCorpus],
    plan: RowPlan,
    tokenizer: Tokenizer,
    mlm: MlmConfig,
    probabilities: Sequence[float],
    seed: int,
) -> BatchAssembler:
    words = WordTables.blank(tokenizer.vocab_size)
    if mlm.unit == "whole_word" and not all(corpus.word_starts for corpus in corpora):
        words = word_tables(tokenizer)
    return BatchAssembler(
        [corpus.dataset for corpus in corpora],
        plan,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
        special_ids=np.array(tokenizer.special_ids, dtype=np.int32),
        first_class=words.first_class,
        last_class=words.last_class,
        starts_word=words.starts_word,
        word_starts=[corpus.word_starts for corpus in corpora],
        probabilities=probabilities,
        unit=mlm.unit,
        max_ngram=mlm.max_ngram,
        mask_ratio=mlm.mask_ratio,
        random_ratio=mlm.random_ratio,
        seed=seed,
    )


def _share(part: CorpusPart) -> str:
    if part.held_out:
        return ""
    epochs = part.corpus.epochs
    if epochs is not None:
        return f", {epochs:g} {'epoch' if epochs == 1 else 'epochs'} asked for"
    return f", weight {part.corpus.weight_or_default:g}"
