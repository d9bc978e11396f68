"""One optimizer step: forward, backward, clipping, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.data.batch import Batch
from megatron_bert.distributed.device_work import wait_for_step
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import RankModel
from megatron_bert.optim.sharded import ShardedOptimizer
from megatron_bert.training.step_parts import StepParts


@dataclass(frozen=True)
class Agreement:
    """What all ranks know about a step before they take it.

    Attributes:
        masked_tokens: number of masked tokens in the global batch.
        batch_hash: order-free hash of the global batch's rows, modulo 2^64.
        stop: some rank was asked to stop after this step.
        figures: each rank's own figures, [ranks, figures]; None if none were given.
    """

    masked_tokens: int
    batch_hash: int
    stop: bool
    figures: list[list[int]] | None = None


@dataclass(frozen=True)
class StepNumbers:
    """A step's results as numbers.

    Attributes:
        loss: mean cross-entropy over the global batch's masked tokens, nats.
        grad_norm: global L2 norm before clipping.
        skipped: whether the update was skipped for a non-finite loss or gradient.
        finite_here: whether the loss of this rank's own rows, and its share of the summed
            gradient, were finite.
    """

    loss: float
    grad_norm: float
    skipped: bool
    finite_here: tuple[bool, bool]


@dataclass(frozen=True)
class StepResult:
    """A step's results, on their way to the host.

    Attributes:
        numbers: fp32 [5] on the host, the fields of `StepNumbers` in order; valid once the device
            has finished the step.
        parts: how long `model` (forward and backward, the sums over ranks that complete loss and
            gradients) and `optimizer` (norm, clipping, update) take.
    """

    numbers: Tensor
    parts: StepParts

    def read(self, timeout_seconds: float) -> StepNumbers:
        """Wait for the end of this step, though not for steps after it, and read its numbers.

        Args:
            timeout_seconds: the longest wait.

        Raises:
            DeviceStalledError: the device has not finished the step by then.
        """
        wait_for_step(self.parts.ended, timeout_seconds)
        loss, grad_norm, skipped, finite_loss, finite_gradient = self.numbers.tolist()
        return StepNumbers(
            loss, grad_norm, bool(skipped), (bool(finite_loss), bool(finite_gradient))
        )


def agree(
    batches: Sequence[Batch],
    stop: bool,
    topology: Topology,
    figures: Sequence[int] | None = None,
) -> Agreement:
    """Sum counts and hashes over the ranks that see different rows, and stop requests over all.

    It is one all-reduce of three integers on the CPU (over gloo, even with CUDA), so it never waits
    for the GPU's queue. Figures of the ranks' own, if given (as many on every rank), travel in the
    same message.
    """
    counts_here = topology.speaks_for_its_rows
    masked = sum(int(batch.weights_BM.sum()) for batch in batches) if counts_here else 0
    row_hash = sum(batch.batch_hash for batch in batches) if counts_here else 0
    message = torch.tensor([masked, _signed(row_hash), int(stop)], dtype=torch.int64)
    if figures is not None:
        table = torch.zeros(dist.get_world_size(), len(figures), dtype=torch.int64)
        table[dist.get_rank()] = torch.tensor(figures)
        message = torch.cat([message, table.flatten()])
    dist.all_reduce(message)
    masked, row_hash, stops = message[:3].tolist()
    by_rank = None if figures is None else message[3:].view(-1, len(figures)).tolist()
    return Agreement(masked, row_hash % 2**64, stops > 0, by_rank)


def take_step(
    model: RankModel,
    optimizer: ShardedOptimizer,
    batches: Sequence[Batch],
    masked_tokens: int,
    learning_rate: float,
) -> StepResult:
    """Accumulate the gradient of the global batch's mean loss and update the weights.

    Each micro-batch's summed loss is divided by the number of masked tokens in the *global*
    batch, so that gradients are sums over micro-batches and ranks and every masked token weighs
    the same, however the batch is divided.
    """
    device = model.topology.device
    parts = StepParts(device)
    count = torch.full((), float(max(1, masked_tokens)), device=device)
    loss = model.runner.train([batch.to(device).model_inputs() for batch in batches], count)
    model.sum_shared_gradients()
    own_loss_is_finite = loss.isfinite()
    if not model.topology.speaks_for_its_loss:
        loss = torch.zeros_like(loss)
    dist.all_reduce(loss)
    parts.end("model")
    update = optimizer.step(learning_rate, loss)
    numbers = [loss, update.grad_norm, update.skipped, own_loss_is_finite, update.is_finite_here]
    # From CUDA, this copies to pinned memory without blocking the host. `item` would wait for all
    # work submitted to the device, the next step's included, and then leave the device idle.
    on_host = torch.stack([number.float() for number in numbers]).to("cpu", non_blocking=True)
    parts.end("optimizer")
    return StepResult(on_host, parts)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer; sums of both wrap alike."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
