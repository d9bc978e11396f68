"""What a run does after which of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config


@dataclass(frozen=True)
class Due:
    """The steps after which a run evaluates and saves, regardless of where its jobs begin and end.

    Attributes:
        total_steps: the run's number of steps; the last one is followed by both.
        evaluation_interval: `eval.interval`, or None if there is no held-out text.
        save_interval: `checkpoint.interval`.
    """

    total_steps: int
    evaluation_interval: int | None
    save_interval: int

    @classmethod
    def of(cls, config: Config, curriculum: Curriculum, *, evaluates: bool) -> Self:
        """Read the intervals; `evaluates` tells whether there is held-out text."""
        interval = config.eval.interval if evaluates else None
        return cls(curriculum.total_steps, interval, config.checkpoint.interval)

    def evaluation(self, step: int) -> bool:
        """Whether the run evaluates after this step."""
        interval = self.evaluation_interval
        return interval is not None and self._is_due(step, interval)

    def save(self, step: int) -> bool:
        """Whether the run saves after this step, whether or not it is a job's last."""
        return self._is_due(step, self.save_interval)

    def _is_due(self, step: int, interval: int) -> bool:
        return step == self.total_steps or step % interval == 0
