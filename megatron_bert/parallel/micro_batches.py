"""A step's micro-batches through the model: forward and backward, gradients accumulated.

One rank's model computes them in turn; `parallel.pipeline` passes them through several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_bert.parallel.data_parallel import (
    add_up_gradients,
    free_gathered_weights,
    set_gradient_sync,
)

# A model's inputs in the order of its arguments. The first is what a pipeline's first stage takes;
# the others go to every stage.
MicroBatch = tuple[Tensor, ...]


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

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return the head's output for each micro-batch, in turn; none on a rank without it."""
        ...


class WholeModel:
    """The model on this rank, from embeddings to head.

    Args:
        model: sharded over data; its output is [1, K], the first of which is the summed loss.
        reshard_after_forward: as it was sharded.
        sum_dtype: in which its gradients are added up.
    """

    def __init__(
        self, model: nn.Module, *, reshard_after_forward: bool, sum_dtype: torch.dtype
    ) -> None:
        self._model = model
        self._reshard_always = reshard_after_forward
        self._sum_dtype = sum_dtype

    def train(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> Tensor:
        """See `MicroBatchRunner`."""
        self._model.train()
        loss = torch.zeros_like(count)
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            set_gradient_sync(self._model, is_last, reshard=is_last or self._reshard_always)
            share = self._model(*micro_batch)[0, 0] / count
            if index == 0:
                # A single one is rather reduced from the compute type: half the bytes.
                add_up_gradients(self._model, None if is_last else self._sum_dtype)
            share.backward()
            loss += share.detach()
        return loss

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See `MicroBatchRunner`."""
        self._model.eval()
        outputs = [self._model(*micro_batch) for micro_batch in micro_batches]
        free_gathered_weights(self._model)
        return outputs
