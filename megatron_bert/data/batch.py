"""A micro-batch of packed, masked rows.

Shape suffixes: B rows, S slots a row, M masked slots a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Replacement(Enum):
    """What the model sees in a token's place; all but `NONE` are to be predicted.

    A randomly drawn token that equals the original one counts as kept.
    """

    NONE = "none"
    MASKED = "masked"
    RANDOM = "random"
    KEPT = "kept"


@dataclass(frozen=True)
class RowArrays:
    """The arrays of a batch: the data core writes into them, the model reads them.

    Attributes:
        tokens_BS: int32, the ids that the model sees.
        positions_BS: int32, counted from 0 in every segment; the padding is a segment of its own.
        masked_BM: int32, slots in the row whose token is to be predicted, ascending; 0 where
            unused.
        labels_BM: int32, the original tokens of those slots; 0 where unused.
        weights_BM: float32, 1 where the slot is used, else 0.
        rows_B: int64, numbers of the rows within the run; -1 for a surplus row, all padding.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    masked_BM: Tensor
    labels_BM: Tensor
    weights_BM: Tensor
    rows_B: Tensor

    @classmethod
    def empty(
        cls, rows: int, seq_length: int, masked_slots: int, *, pin_memory: bool = False
    ) -> RowArrays:
        """Allocate `rows` uninitialised rows on the host; pinned memory needs CUDA."""

        def array(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=pin_memory)

        return cls(
            tokens_BS=array(torch.int32, rows, seq_length),
            positions_BS=array(torch.int32, rows, seq_length),
            masked_BM=array(torch.int32, rows, masked_slots),
            labels_BM=array(torch.int32, rows, masked_slots),
            weights_BM=array(torch.float32, rows, masked_slots),
            rows_B=array(torch.int64, rows),
        )

    def part(self, first: int, end: int) -> RowArrays:
        """A view of rows `first` to `end` (exclusive), in the same memory."""
        return RowArrays(*(tensor[first:end] for tensor in self.model_inputs()))

    def replacements(self, mask_id: int) -> Tensor:
        """int64 [B, M]: each masked slot's index in `Replacement`; meaningless where unused.

        Args:
            mask_id: id of `<MASK>`, which is never a label.
        """
        seen_BM = self.tokens_BS.gather(1, self.masked_BM.long())
        # 1, 2 or 3.
        return 2 - (seen_BM == mask_id).long() + (seen_BM == self.labels_BM)

    def model_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return tokens, positions, masked, labels, weights and rows, as the model takes them."""
        return (
            self.tokens_BS,
            self.positions_BS,
            self.masked_BM,
            self.labels_BM,
            self.weights_BM,
            self.rows_B,
        )


@dataclass(frozen=True)
class Batch(RowArrays):
    """Rows `[CLS] text [SEP] [CLS] text [SEP] ...`, padded and masked.

    Attributes:
        batch_hash: sum modulo 2^64 of a hash of every row's tokens, positions, masked and labels;
            surplus rows add nothing.
    """

    batch_hash: int

    @classmethod
    def of(cls, arrays: RowArrays, batch_hash: int) -> Batch:
        """Wrap assembled rows without copying them."""
        return cls(*arrays.model_inputs(), batch_hash)

    def to(self, device: torch.device) -> Batch:
        """Copy to a device, asynchronously if the memory is pinned."""
        copies = RowArrays(*(t.to(device, non_blocking=True) for t in self.model_inputs()))
        return Batch.of(copies, self.batch_hash)
