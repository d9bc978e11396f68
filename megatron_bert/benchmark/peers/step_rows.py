"""The rows of a step that trainers are compared by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRows:
    """How a step's rows are computed.

    Attributes:
        micro_rows: of a micro-batch.
        micro_batches: whose gradients are added up.
    """

    micro_rows: int
    micro_batches: int

    @property
    def rows(self) -> int:
        """Of the step."""
        return self.micro_rows * self.micro_batches
