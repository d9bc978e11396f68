"""Run a step's micro-batches through the model, forward and backward, accumulating gradients.

One rank's model computes them in turn; `parallel.pipeline` passes them through several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_bert.parallel.data_parallel import ShardedModel

# A model's inputs in the order of its arguments. The first is what a pipeline's first stage takes;
# the others go to every stage.
MicroBatch = tuple[Tensor, ...]


class HeadOutput(NamedTuple):
    """The output of the model's head for a micro-batch's masked slots.

    Attributes:
        loss: their summed cross-entropy in nats, weighted; fp32, a scalar.
        correct_N: for each slot, row by row, its weight where its label has the largest logit, else
            0; fp32 [N], without a gradient.
    """

    loss: Tensor
    correct_N: Tensor


class MicroBatchRunner(Protocol):
    """What a training step needs of the ranks that hold the model."""

    def train(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> Tensor:
        """Accumulate the gradient of the summed loss / count on the parameters.

        Args:
            micro_batches: all of one shape.
            count: fp32 scalar, what each micro-batch's summed loss is divided by.

        Returns:
            The micro-batches' summed loss / count, an fp32 scalar; 0 on a rank without the head.
        """
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[HeadOutput]:
        """Return the head's output for each micro-batch, in turn; none on a rank without it."""
        ...


class WholeModel:
    """The model on this rank, from embeddings to head.

    Attributes:
        model: returns a `HeadOutput`.
    """

    def __init__(self, model: ShardedModel[Any]) -> None:
        self.model = model

    def train(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> Tensor:
        """See `MicroBatchRunner`."""
        self.model.module.train()
        loss = torch.zeros_like(count)
        with self.model.step(len(micro_batches)):
            for index, micro_batch in enumerate(micro_batches):
                if index == len(micro_batches) - 1:
                    self.model.begin_last_pass()
                share = self.model.module(*micro_batch).loss / count
                share.backward()
                loss += share.detach()
        return loss

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[HeadOutput]:
        """See `MicroBatchRunner`."""
        self.model.module.eval()
        with self.model.step():
            return [self.model.module(*micro_batch) for micro_batch in micro_batches]
