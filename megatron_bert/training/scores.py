"""How well masked tokens are predicted: counts on the device, and the scores made from them.

Shape suffixes: B rows, M masked slots a row, K kinds of tokens, V pieces of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_bert.data.batch import Replacement, RowArrays
from megatron_bert.data.token_kinds import TOKEN_KINDS, token_kinds
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.parallel.micro_batches import HeadOutput

REPLACEMENTS = tuple(kind.value for kind in Replacement if kind is not Replacement.NONE)
"""What the model sees in place of a token that it must predict, as named in the metrics."""


@dataclass(frozen=True)
class Score:
    """Scores over a text's masked tokens.

    Attributes:
        loss: mean cross-entropy, nats.
        accuracy: share predicted correctly.
        by_replacement: accuracy on the tokens of each of the `REPLACEMENTS` that occurs.
        by_characters: accuracy on the tokens of each of the `TOKEN_KINDS` that occurs.
    """

    loss: float
    accuracy: float
    by_replacement: Mapping[str, float]
    by_characters: Mapping[str, float]


class SlotKinds:
    """Classifies masked slots by what the model sees there and by the token to predict.

    Args:
        tokenizer: the tokenizer that made the text.
        device: where the rows are.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._mask_id = tokenizer.mask_id
        self._of_token_V = torch.from_numpy(token_kinds(tokenizer)).to(device)

    def __call__(self, rows: RowArrays) -> Tensor:
        """Return int64 [B, M]: the number of the replacement times K plus that of the kind."""
        # Indices into REPLACEMENTS, which leaves out the first one, NONE.
        replacement_BM = rows.replacements(self._mask_id) - 1
        kind_BM = self._of_token_V[rows.labels_BM.long()]
        return replacement_BM * len(TOKEN_KINDS) + kind_BM


class Tally:
    """Sums over a text's masked tokens, fp64 in one tensor on the device."""

    def __init__(self, kinds: SlotKinds, device: torch.device) -> None:
        self._kinds = kinds
        count = len(REPLACEMENTS) * len(TOKEN_KINDS)
        self._sums = torch.zeros(1 + 2 * count, dtype=torch.float64, device=device)
        self._loss, self._right_and_all = self._sums[:1], self._sums[1:].view(2, count)

    def add(self, rows: RowArrays, output: HeadOutput) -> None:
        """Count a micro-batch, given the head's output for it."""
        self._loss += output.loss.double()
        weights_N = rows.weights_BM.flatten()
        right_and_all = torch.stack([output.correct_N, weights_N]).double()
        self._right_and_all.index_add_(1, self._kinds(rows).flatten(), right_and_all)

    def sum_over_ranks(self, *, counts_here: bool) -> None:
        """Sum the counts over all ranks but those that counted the same tokens as another."""
        if not counts_here:
            self._sums.zero_()
        dist.all_reduce(self._sums)

    def score(self) -> Score:
        """Return the scores, waiting for the device; without any token they are 0."""
        loss, *counts = self._sums.tolist()
        table = np.array(counts).reshape(2, len(REPLACEMENTS), len(TOKEN_KINDS))
        right, all_tokens = table.sum((1, 2)).tolist()
        return Score(
            loss / max(1.0, all_tokens),
            right / max(1.0, all_tokens),
            _shares(REPLACEMENTS, table.sum(2)),
            _shares(TOKEN_KINDS, table.sum(1)),
        )


def _shares(names: Sequence[str], right_and_all: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy on each kind's tokens; kinds without any token are left out."""
    counts = zip(names, *right_and_all.tolist(), strict=True)
    return {name: right / count for name, right, count in counts if count}
