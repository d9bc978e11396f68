"""One optimizer step: forward, backward, clipping, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.data.batch import Batch
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.optim.adamw import ShardedAdamW
from megatron_bert.parallel.data_parallel import set_gradient_sync


@dataclass(frozen=True)
class Agreement:
    """What all ranks know about a step before they take it.

    Attributes:
        masked_tokens: number of masked tokens in the global batch.
        batch_hash: order-free hash of the global batch's rows, modulo 2^64.
        stop: some rank was asked to stop after this step.
    """

    masked_tokens: int
    batch_hash: int
    stop: bool


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, still on the device.

    Attributes:
        loss: mean cross-entropy over the global batch's masked tokens, nats.
        grad_norm: global L2 norm before clipping.
        skipped: 1.0 where the update was skipped for a non-finite gradient.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


def agree(batches: Sequence[Batch], stop: bool, topology: Topology) -> Agreement:
    """Sum counts and hashes over the data-parallel ranks and stop requests over all.

    One message of three integers on the CPU (over gloo, also beside CUDA): the GPU's queue is
    never waited for.
    """
    # Tensor-parallel ranks hold the same rows, which count once.
    counts_here = topology.tensor_parallel.rank == 0
    masked = sum(int(batch.weights_BM.sum()) for batch in batches) if counts_here else 0
    row_hash = sum(batch.batch_hash for batch in batches) if counts_here else 0
    message = torch.tensor([masked, _signed(row_hash), int(stop)], dtype=torch.int64)
    dist.all_reduce(message)
    masked, row_hash, stops = message.tolist()
    return Agreement(masked, row_hash % 2**64, stops > 0)


def take_step(
    model: BertForPretraining,
    optimizer: ShardedAdamW,
    batches: Sequence[Batch],
    masked_tokens: int,
    learning_rate: float,
    topology: Topology,
) -> StepResult:
    """Accumulate the gradient of the global batch's mean loss and update the weights.

    Each micro-batch's summed loss is divided by the number of masked tokens in the *global*
    batch, so that gradients are sums over micro-batches and ranks and every masked token weighs
    the same, however the batch is divided.
    """
    model.train()
    loss = torch.zeros((), dtype=torch.float32, device=topology.device)
    for index, batch in enumerate(batches):
        set_gradient_sync(model, index == len(batches) - 1)
        share = model(*batch.to(topology.device).model_inputs()).loss / max(1, masked_tokens)
        share.backward()
        loss += share.detach()
    dist.all_reduce(loss, group=topology.data_parallel_group)
    grad_norm, skipped = optimizer.step(learning_rate)
    return StepResult(loss, grad_norm, skipped)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer; sums of both wrap alike."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
