"""Loss and accuracy on held-out corpora."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import cached_property

from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.curriculum import StageSpan
from megatron_bert.config.schema import Config
from megatron_bert.data.source import RowSource
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import RankModel
from megatron_bert.training.batches import GlobalBatch, ReadAhead
from megatron_bert.training.held_out import HeldOutRows, Measure
from megatron_bert.training.scores import Score, SlotKinds, Tally
from megatron_bert.training.staging import HostMemory


class Evaluator:
    """Scores the model on each held-out text, always on the same rows and masks.

    Args:
        config: of the run.
        held_out: the text's rows.
        tokenizer: the tokenizer that made the text; it tells the kinds of tokens.
        topology: the ranks.
    """

    def __init__(
        self, config: Config, held_out: HeldOutRows, tokenizer: Tokenizer, topology: Topology
    ) -> None:
        self._config = config
        self._held_out = held_out
        self._topology = topology
        self._tokenizer = tokenizer

    @cached_property
    def _kinds(self) -> SlotKinds:
        """Made on first use: a large vocabulary takes a second, and only evaluation needs it."""
        return SlotKinds(self._tokenizer, self._topology.device)

    @property
    def has_text(self) -> bool:
        """Whether anything is evaluated."""
        return bool(self._held_out.names)

    def evaluate(self, model: RankModel, span: StageSpan) -> dict[str, object]:
        """Score every corpus at the stage's length and masking rate, and at the fixed ones.

        Returns:
            The fields of a metrics line: `valid_loss` and `valid_accuracy` (means over the corpora
            at the stage's measure), and under `valid` each corpus' scores by both measures, with
            the accuracy by kind at the stage's measure.
        """
        held_out = self._held_out
        own, fixed = Measure.of(span), held_out.fixed
        here = self._scores(model, own)
        there = here if own == fixed else self._scores(model, fixed)
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
                    "accuracy_by_replacement": at_stage.by_replacement,
                    "accuracy_by_characters": at_stage.by_characters,
                }
                for name, at_stage, at_fixed in zip(held_out.names, here, there, strict=True)
            },
        }

    def _scores(self, model: RankModel, measure: Measure) -> list[Score]:
        return [self._score(model, source) for source in self._held_out.sources[measure]]

    def _score(self, model: RankModel, source: RowSource) -> Score:
        topology, device = self._topology, self._topology.device
        tally = Tally(self._kinds, device)
        with closing(self._read(source)) as steps:
            for micro_batches in steps:
                copies = [batch.to(device) for batch in micro_batches]
                outputs = model.runner.evaluate([batch.model_inputs() for batch in copies])
                # There are no outputs if another rank has the head; that rank counts them.
                for batch, output in zip(copies, outputs, strict=bool(outputs)):
                    tally.add(batch, output)
        tally.sum_over_ranks(counts_here=topology.speaks_for_its_loss)
        return tally.score()

    def _read(self, source: RowSource) -> ReadAhead:
        """A text's rows in global batches of `batch.global_size` rows, whatever the stage."""
        seq_length, _ = source.row_shape(0)
        # Text shorter than the global batch is one batch of its own size.
        size = min(self._config.batch.global_size, source.num_rows)
        layout = BatchLayout.of(self._config, size, seq_length, self._topology.data_parallel_size)
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
