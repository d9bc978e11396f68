"""The held-out text of a run, and the rows that evaluation reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from megatron_bert.config.arithmetic import fixed_eval_length
from megatron_bert.config.curriculum import Curriculum, StageSpan
from megatron_bert.config.schema import Config
from megatron_bert.data.corpora import open_evaluation_corpora, part_names
from megatron_bert.data.source import RowSource, validation_source
from megatron_bert.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Measure:
    """How held-out rows are made: their length in slots and the share of their tokens masked."""

    seq_length: int
    probability: float

    @classmethod
    def of(cls, span: StageSpan) -> Self:
        """Return the measure that a stage is trained by."""
        return cls(span.seq_length, span.probability)


@dataclass(frozen=True)
class HeldOutRows:
    """The rows of each held-out text, by every stage's measure and by one fixed measure.

    Attributes:
        names: the texts' names in the metrics.
        sources: for each measure, one row source per text.
        fixed: the measure that is the same in every stage, so that stages can be compared.
        warnings: what the user should know about text that is not evaluated.
    """

    names: list[str]
    sources: Mapping[Measure, list[RowSource]]
    fixed: Measure
    warnings: list[str]

    @classmethod
    def plan(cls, config: Config, tokenizer: Tokenizer) -> Self:
        """Open each text once and plan all that the run will evaluate of it.

        Raises:
            DataError: a corpus is missing, damaged or empty, another tokenizer made it, or nothing
                is held out.
        """
        corpora, warnings = open_evaluation_corpora(config, tokenizer)
        fixed = Measure(fixed_eval_length(config), config.mlm.probability)
        spans = Curriculum(config).spans
        measures = {fixed, *(Measure.of(span) for span in spans)}
        sources = {
            measure: [
                validation_source(
                    config, tokenizer, corpus, measure.seq_length, measure.probability
                )
                for corpus in corpora
            ]
            for measure in measures
        }
        return cls(part_names([corpus.part for corpus in corpora]), sources, fixed, warnings)

    def slots(self, span: StageSpan) -> int:
        """Token slots that one evaluation in a stage reads, over all texts and both measures."""
        return sum(
            measure.seq_length * source.num_rows
            for measure in {Measure.of(span), self.fixed}
            for source in self.sources[measure]
        )
