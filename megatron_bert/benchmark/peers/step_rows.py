"""The rows of a step that trainers are compared by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_bert.config.schema import BatchConfig

# Into which a micro-batch is cut where memory does not suffice.
_MOST_PARTS = 8


@dataclass(frozen=True)
class StepRows:
    """How a step's rows are computed.

    Attributes:
        micro_rows: of a micro-batch.
        micro_batches: whose gradients are added up.
    """

    micro_rows: int
    micro_batches: int

    @classmethod
    def of(cls, micro_tokens: int, seq_length: int, micro_batches: int) -> StepRows:
        """As many rows as fit into so many slots, less those over a multiple of what is tried."""
        rows = BatchConfig.rows_in(micro_tokens, seq_length)
        return cls(
            max(rows - rows % _MOST_PARTS, min(rows, 1 << rows.bit_length() - 1)), micro_batches
        )

    def smaller(self) -> Iterator[StepRows]:
        """The same rows in micro-batches of all, half of them, and so on, to an eighth."""
        parts = 1
        while parts <= _MOST_PARTS and self.micro_rows % parts == 0:
            yield StepRows(self.micro_rows // parts, self.micro_batches * parts)
            parts *= 2

    @property
    def rows(self) -> int:
        """Of the step."""
        return self.micro_rows * self.micro_batches
