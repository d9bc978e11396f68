"""Where in the curriculum a step is, and how many rows and slots come before it.

The only module that knows how many rows a step has, which may differ between stages.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.schema import Config, Stage


@dataclass(frozen=True)
class StageSpan:
    """One stage's place in the run and its settings, with the run's defaults filled in.

    Attributes:
        index: 0-based number of the stage.
        seq_length: token slots of its rows.
        global_size: rows in one optimizer step.
        probability: share of a row's text tokens that are to be predicted.
        masked_slots: masked slots of a row.
        lr_factor: factor on the scheduled learning rate.
        first_step: 1-based number of its first step.
        last_step: number of its last step, inclusive.
        first_row: number of its first row within the run.
    """

    index: int
    seq_length: int
    global_size: int
    probability: float
    masked_slots: int
    lr_factor: float
    first_step: int
    last_step: int
    first_row: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.last_step - self.first_step + 1

    @property
    def num_rows(self) -> int:
        """Rows of all its steps."""
        return self._rows_until(self.last_step)

    @property
    def slots_per_step(self) -> int:
        """Token slots of one optimizer step."""
        return self.global_size * self.seq_length

    def rows_of(self, step: int) -> range:
        """Numbers, within the run, of the rows that a step of this stage reads."""
        end = self.first_row + self._rows_until(step)
        return range(end - self.global_size, end)

    def _rows_until(self, step: int) -> int:
        return self.global_size * (step - self.first_step + 1)


class Curriculum:
    """The stages of a run laid end to end."""

    def __init__(self, config: Config) -> None:
        self.spans: list[StageSpan] = []
        steps = rows = 0
        for index, stage in enumerate(config.curriculum):
            span = _span(config, index, stage, steps + 1, rows)
            self.spans.append(span)
            steps, rows = span.last_step, rows + span.num_rows

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.spans[-1].last_step

    @property
    def total_slots(self) -> int:
        """Token slots of the whole run."""
        return self.slots_until(self.total_steps)

    def at(self, step: int) -> StageSpan:
        """Return the stage that a 1-based step belongs to."""
        assert 1 <= step <= self.total_steps, f"step {step} of {self.total_steps}"
        return self.spans[bisect_left(self.spans, step, key=lambda span: span.last_step)]

    def rows_until(self, step: int) -> int:
        """Rows of all steps up to and including this one; 0 for step 0."""
        return self.at(step).rows_of(step).stop if step else 0

    def slots_until(self, step: int) -> int:
        """Token slots of all steps up to and including this one; 0 for step 0."""
        return sum(
            span.slots_per_step * max(0, min(step, span.last_step) - span.first_step + 1)
            for span in self.spans
        )


def _span(config: Config, index: int, stage: Stage, first_step: int, first_row: int) -> StageSpan:
    size, probability = stage.batch.global_size, stage.mlm.probability
    probability = config.mlm.probability if probability is None else probability
    return StageSpan(
        index=index,
        seq_length=stage.seq_length,
        global_size=config.batch.global_size if size is None else size,
        probability=probability,
        masked_slots=masked_slots(probability, config.mlm.unit, stage.seq_length),
        lr_factor=stage.lr_factor,
        first_step=first_step,
        last_step=first_step + stage.steps - 1,
        first_row=first_row,
    )
