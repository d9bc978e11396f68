"""Which of a micro-batch's tokens a rank's hidden states hold.

Shape suffixes: B rows, S slots, T tokens of this rank, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bert.distributed.topology import TensorParallelGroup


@dataclass(frozen=True)
class TokenShare:
    """A stretch of the micro-batch's rows laid end to end: all of it, or 1 / tp of it.

    Hidden states are [T, D], the stretch's tokens one after another, so that ranks that share them
    gather and scatter along dimension 0, which moves no byte twice.

    Attributes:
        rows: B, of the micro-batch.
        slots: S, of a row.
        first: number of the stretch's first token.
        count: T, its tokens.
    """

    rows: int
    slots: int
    first: int
    count: int

    @classmethod
    def of(cls, tp: TensorParallelGroup, rows: int, slots: int) -> TokenShare:
        """This rank's share of B rows of S slots; B x S divides over the ranks that share them."""
        if not tp.shards_tokens:
            return cls(rows, slots, 0, rows * slots)
        count = rows * slots // tp.size
        return cls(rows, slots, count * tp.rank, count)

    def take(self, x_BS: Tensor) -> Tensor:
        """[..., B, S], or 1 to be broadcast -> [..., T], the values of this rank's tokens."""
        whole = x_BS.expand(*x_BS.shape[:-2], self.rows, self.slots).flatten(-2)
        return whole.narrow(-1, self.first, self.count)

    def slot_numbers(self, device: torch.device) -> Tensor:
        """int64 [T], the tokens' places in their rows."""
        return self.take(torch.arange(self.slots, device=device)[None])

    def gather_slots(self, x_TD: Tensor, slots_BM: Tensor) -> Tensor:
        """Take slots of every row out of this rank's hidden states.

        Args:
            x_TD: [T, D].
            slots_BM: int [B, M], numbers within the rows.

        Returns:
            [B, M, D], zero where the token is another rank's: the ranks' sum is the whole.
        """
        row_B1 = torch.arange(self.rows, device=slots_BM.device)[:, None] * self.slots
        token_BM = row_B1 + slots_BM - self.first
        if self.count == self.rows * self.slots:
            return x_TD[token_BM]
        absent_BM = (token_BM < 0) | (token_BM >= self.count)
        taken_BMD = x_TD[token_BM.masked_fill(absent_BM, 0)]
        return taken_BMD.masked_fill(absent_BM[..., None], 0.0)
