"""The rows of a step, for comparing trainers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_bert.config.schema import BatchConfig

# The most parts into which a micro-batch is divided if memory does not suffice.
_MOST_PARTS = 8


@dataclass(frozen=True)
class StepRows:
    """How a step's rows are divided into micro-batches.

    Attributes:
        micro_rows: rows of a micro-batch.
        micro_batches: number of micro-batches, whose gradients are summed.
    """

    micro_rows: int
    micro_batches: int

    @classmethod
    def of(cls, micro_tokens: int, seq_length: int, micro_batches: int) -> StepRows:
        """As many rows as fit in `micro_tokens` slots, rounded down so that they can be divided."""
        rows = BatchConfig.rows_in(micro_tokens, seq_length)
        return cls(
            max(rows - rows % _MOST_PARTS, min(rows, 1 << rows.bit_length() - 1)), micro_batches
        )

    def smaller(self) -> Iterator[StepRows]:
        """Yield the same rows in micro-batches of full size, half of it, and so on to an eighth."""
        parts = 1
        while parts <= _MOST_PARTS and self.micro_rows % parts == 0:
            yield StepRows(self.micro_rows // parts, self.micro_batches * parts)
            parts *= 2

    @property
    def rows(self) -> int:
        """Rows of the step."""
        return self.micro_rows * self.micro_batches
