"""Loss and accuracy on held-out corpora."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_bert.config.arithmetic import fixed_eval_length
from megatron_bert.config.curriculum import StageSpan
from megatron_bert.config.layout import BatchLayout
from megatron_bert.config.schema import Config
from megatron_bert.data.corpora import CorpusPart, evaluation_parts, part_names
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
    """Scores the model on each held-out text, always on the same rows and masks."""

    def __init__(self, config: Config, tokenizer: Tokenizer, topology: Topology) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._topology = topology
        self._sources: dict[tuple[CorpusPart, Measure], RowSource] = {}
        # The same in every stage, so that stages can be compared.
        self._fixed = Measure(fixed_eval_length(config), config.mlm.probability)
        self._parts = evaluation_parts(config)
        for part in self._parts:
            self._source(part, self._fixed)  # bad data is refused at the start

    @property
    def has_text(self) -> bool:
        """Whether anything is evaluated."""
        return bool(self._parts)

    def evaluate(self, model: BertForPretraining, span: StageSpan) -> dict[str, object]:
        """Score every corpus as the stage is trained, and at the fixed length and masking rate.

        Returns:
            The fields of a metrics line: `valid_loss` and `valid_accuracy` (means over the corpora
            as the stage is trained), and under `valid` each corpus' scores both ways.
        """
        own, fixed = Measure(span.seq_length, span.probability), self._fixed
        here = [self._score(model, part, own) for part in self._parts]
        there = here if own == fixed else [self._score(model, part, fixed) for part in self._parts]
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
                for name, at_stage, at_fixed in zip(
                    part_names(self._parts), here, there, strict=True
                )
            },
        }

    @torch.no_grad()
    def _score(self, model: BertForPretraining, part: CorpusPart, measure: Measure) -> Score:
        device = self._topology.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        model.eval()
        with closing(self._read(part, measure)) as steps:
            for micro_batches in steps:
                for batch in micro_batches:
                    batch = batch.to(device)
                    result = model(*batch.model_inputs())
                    sums += torch.stack([result.loss, result.correct, batch.weights_BM.sum()])
        free_gathered_weights(model)
        dist.all_reduce(sums, group=self._topology.data_parallel_group)
        loss, correct, count = sums.tolist()
        return Score(loss / max(1.0, count), correct / max(1.0, count))

    def _read(self, part: CorpusPart, measure: Measure) -> ReadAhead:
        """The part's rows in global batches of `batch.global_size` rows, whatever the stage."""
        source, batch = self._source(part, measure), self._config.batch
        # Text shorter than the global batch is one batch of its own size.
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

    def _source(self, part: CorpusPart, measure: Measure) -> RowSource:
        key = (part, measure)
        if key not in self._sources:
            self._sources[key] = validation_source(
                self._config, self._tokenizer, part, measure.seq_length, measure.probability
            )
        return self._sources[key]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
