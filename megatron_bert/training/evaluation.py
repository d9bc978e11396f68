"""Loss and accuracy on held-out corpora."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePath

import torch
import torch.distributed as dist

from megatron_bert.config.arithmetic import fixed_eval_length
from megatron_bert.config.curriculum import StageSpan
from megatron_bert.config.layout import BatchLayout
from megatron_bert.config.schema import Config, Corpus
from megatron_bert.data.source import RowSource, validation_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.parallel.data_parallel import free_gathered_weights
from megatron_bert.training.batches import GlobalBatch, ReadAhead
from megatron_bert.training.staging import HostMemory


@dataclass(frozen=True)
class Measure:
    """How held-out rows are made: their slots and the share of their tokens that is masked."""

    seq_length: int
    probability: float


@dataclass(frozen=True)
class Score:
    """Mean over a corpus' masked tokens: cross-entropy in nats and share predicted right."""

    loss: float
    accuracy: float


class Evaluator:
    """Scores the model on each held-out corpus, always on the same rows and masks."""

    def __init__(self, config: Config, tokenizer: Tokenizer, topology: Topology) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._topology = topology
        self._sources: dict[tuple[str, Measure], RowSource] = {}
        # The same in every stage, so that stages can be compared.
        self._fixed = Measure(fixed_eval_length(config), config.mlm.probability)
        for corpus in config.data.valid:
            self._source(corpus, self._fixed)  # bad data is refused at the start

    def evaluate(self, model: BertForPretraining, span: StageSpan) -> dict[str, object]:
        """Score every corpus as the stage is trained, and at the fixed length and masking rate.

        Returns:
            The fields of a metrics line: `valid_loss` and `valid_accuracy` (means over the corpora
            as the stage is trained), and under `valid` each corpus' scores both ways.
        """
        corpora = self._config.data.valid
        own, fixed = Measure(span.seq_length, span.probability), self._fixed
        here = [self._score(model, corpus, own) for corpus in corpora]
        there = here if own == fixed else [self._score(model, corpus, fixed) for corpus in corpora]
        return {
            "valid_loss": _mean([score.loss for score in here]),
            "valid_accuracy": _mean([score.accuracy for score in here]),
            "valid_seq_length": own.seq_length,
            "fixed_seq_length": fixed.seq_length,
            "valid": {
                name: {
                    "loss": at_stage.loss,
                    "accuracy": at_stage.accuracy,
                    "fixed_loss": at_fixed.loss,
                    "fixed_accuracy": at_fixed.accuracy,
                }
                for name, at_stage, at_fixed in zip(corpus_names(corpora), here, there, strict=True)
            },
        }

    @torch.no_grad()
    def _score(self, model: BertForPretraining, corpus: Corpus, measure: Measure) -> Score:
        device = self._topology.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        model.eval()
        with closing(self._read(corpus, measure)) as steps:
            for micro_batches in steps:
                for batch in micro_batches:
                    batch = batch.to(device)
                    result = model(*batch.model_inputs())
                    sums += torch.stack([result.loss, result.correct, batch.weights_BM.sum()])
        free_gathered_weights(model)
        dist.all_reduce(sums, group=self._topology.data_parallel_group)
        loss, correct, count = sums.tolist()
        return Score(loss / max(1.0, count), correct / max(1.0, count))

    def _read(self, corpus: Corpus, measure: Measure) -> ReadAhead:
        """The corpus' rows in global batches of `batch.global_size` rows, whatever the stage."""
        source, batch = self._source(corpus, measure), self._config.batch
        # A corpus smaller than the global batch is one batch of its own size.
        size = min(batch.global_size, source.num_rows)
        layout = BatchLayout.divide(
            size, self._topology.data_parallel_size, batch.max_micro_rows(measure.seq_length)
        )
        batches = (
            GlobalBatch(range(first, min(first + size, source.num_rows)), 0, layout)
            for first in range(0, source.num_rows, size)
        )
        return ReadAhead(
            source,
            self._topology.data_parallel_rank,
            batches,
            HostMemory.for_device(self._topology.device),
            self._config.data.threads,
        )

    def _source(self, corpus: Corpus, measure: Measure) -> RowSource:
        key = (corpus.prefix, measure)
        if key not in self._sources:
            self._sources[key] = validation_source(
                self._config, self._tokenizer, corpus, measure.seq_length, measure.probability
            )
        return self._sources[key]


def corpus_names(corpora: Sequence[Corpus]) -> list[str]:
    """Name each corpus in metrics: the last part of its prefix, or all of it where two share it."""
    short = [PurePath(corpus.prefix).name for corpus in corpora]
    return [
        name if short.count(name) == 1 else corpus.prefix
        for corpus, name in zip(corpora, short, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
