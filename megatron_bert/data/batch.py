"""A micro-batch of packed, masked rows.

Shape suffixes: B rows, S slots a row, M masked slots a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows `[CLS] text [SEP] [CLS] text [SEP] ...`, padded and masked.

    Attributes:
        tokens_BS: int32, the ids that the model sees.
        positions_BS: int32, counted from 0 in every segment, and in the padding, which is a
            segment of its own.
        masked_BM: int32, slots in the row whose token is to be predicted, ascending; 0 where
            unused.
        labels_BM: int32, the tokens that stood there; 0 where unused.
        weights_BM: float32, 1 where the slot is used, else 0.
        rows_B: int64, numbers of the rows within the run; -1 for a surplus row, all padding.
        batch_hash: sum modulo 2^64 of a hash of every row's tokens, positions, masked and labels;
            surplus rows add nothing.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    masked_BM: Tensor
    labels_BM: Tensor
    weights_BM: Tensor
    rows_B: Tensor
    batch_hash: int

    def to(self, device: torch.device) -> Batch:
        """Copy to a device, without waiting for the copy where the memory is pinned."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            tokens_BS=copy(self.tokens_BS),
            positions_BS=copy(self.positions_BS),
            masked_BM=copy(self.masked_BM),
            labels_BM=copy(self.labels_BM),
            weights_BM=copy(self.weights_BM),
            rows_B=copy(self.rows_B),
            batch_hash=self.batch_hash,
        )

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
