"""Loss and accuracy on held-out corpora."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch
import torch.distributed as dist

from megatron_bert.config.arithmetic import fixed_eval_length
from megatron_bert.config.layout import BatchLayout
from megatron_bert.config.schema import Config, Corpus
from megatron_bert.data.source import RowSource, validation_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.parallel.data_parallel import free_gathered_weights
from megatron_bert.training.batches import GlobalBatch


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
        self._sources: dict[tuple[str, int], RowSource] = {}
        for corpus in config.data.valid:
            self._source(corpus, fixed_eval_length(config))  # bad data is refused at the start

    def evaluate(self, model: BertForPretraining, seq_length: int) -> dict[str, object]:
        """Score every corpus at `seq_length` and at the fixed length.

        Returns:
            The fields of a metrics line: `valid_loss` and `valid_accuracy` (means over the corpora
            at `seq_length`), and under `valid` each corpus' scores at both lengths.
        """
        fixed = fixed_eval_length(self._config)
        corpora = self._config.data.valid
        here = [self._score(model, corpus, seq_length) for corpus in corpora]
        same = fixed == seq_length
        there = here if same else [self._score(model, corpus, fixed) for corpus in corpora]
        return {
            "valid_loss": _mean([score.loss for score in here]),
            "valid_accuracy": _mean([score.accuracy for score in here]),
            "valid_seq_length": seq_length,
            "fixed_seq_length": fixed,
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
    def _score(self, model: BertForPretraining, corpus: Corpus, seq_length: int) -> Score:
        source = self._source(corpus, seq_length)
        # A corpus smaller than the global batch is one batch of its own size.
        rows = min(self._config.batch.global_size, source.num_rows)
        layout = BatchLayout.for_stage(
            self._config.batch.model_copy(update={"global_size": rows}),
            self._topology.data_parallel_size,
            seq_length,
        )
        sums = torch.zeros(3, dtype=torch.float64, device=self._topology.device)
        model.eval()
        for first_row in range(0, source.num_rows, layout.global_size):
            end_row = min(first_row + layout.global_size, source.num_rows)
            part = GlobalBatch(first_row, end_row, seq_length, layout)
            for batch in part.micro_batches(source, self._topology.data_parallel_rank):
                batch = batch.to(self._topology.device)
                result = model(*batch.model_inputs())
                sums += torch.stack([result.loss, result.correct, batch.weights_BM.sum()])
        free_gathered_weights(model)
        dist.all_reduce(sums, group=self._topology.data_parallel_group)
        loss, correct, count = sums.tolist()
        return Score(loss / max(1.0, count), correct / max(1.0, count))

    def _source(self, corpus: Corpus, seq_length: int) -> RowSource:
        key = (corpus.prefix, seq_length)
        if key not in self._sources:
            self._sources[key] = validation_source(
                self._config, self._tokenizer, corpus, seq_length
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
