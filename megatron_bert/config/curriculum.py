"""Where in the curriculum a step lies."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bert.config.schema import Stage


@dataclass(frozen=True)
class StageSpan:
    """One stage's place in the run.

    Attributes:
        index: 0-based number of the stage.
        seq_length: token slots of its rows.
        first_step: 1-based number of its first step.
        last_step: number of its last step, included.
    """

    index: int
    seq_length: int
    first_step: int
    last_step: int


class Curriculum:
    """The stages of a run laid end to end."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.spans: list[StageSpan] = []
        done = 0
        for index, stage in enumerate(stages):
            self.spans.append(StageSpan(index, stage.seq_length, done + 1, done + stage.steps))
            done += stage.steps
        self.total_steps = done

    def at(self, step: int) -> StageSpan:
        """Return the stage that a 1-based step belongs to."""
        assert 1 <= step <= self.total_steps, f"step {step} of {self.total_steps}"
        return self.spans[bisect_left(self.spans, step, key=lambda span: span.last_step)]

    def slots_until(self, step: int) -> int:
        """Token slots of one row a step, summed over all steps up to and including this one."""
        return sum(
            span.seq_length * max(0, min(step, span.last_step) - span.first_step + 1)
            for span in self.spans
        )
