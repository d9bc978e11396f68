"""Pipeline parallelism: PyTorch's stages and schedules around this project's fixed shapes.

1F1B and its interleaved form are Narayanan et al. 2021 (sections 2.2.1 and 2.2.2), zero bubble is
Qi et al. 2024. Every rank makes the same rows itself, so that only activations travel between
stages and only their gradients back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from megatron_bert.distributed.topology import Topology
from megatron_bert.parallel.data_parallel import free_gathered_weights
from megatron_bert.parallel.micro_batches import MicroBatch

ScheduleName = Literal["1f1b", "interleaved", "zero_bubble"]
_INTERLEAVED = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
# Outputs of the head for one micro-batch: loss and number right.
_HEAD_OUTPUTS = 2


@dataclass(frozen=True)
class _Shape:
    """What a schedule is made for; another one needs other stages and buffers."""

    micro_batches: int
    input_shape: torch.Size
    with_backward: bool


class Pipeline:
    """This rank's stages of a model that several ranks hold, and the order of their work.

    Args:
        chunks: the stages that this rank holds, each sharded over data: stage r, r + p, r + 2p, ...
            of rank r of p.
        schedule: the order of the micro-batches.
        topology: the ranks.
        hidden_size: width of what travels between stages.
        compute_dtype: its type.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        schedule: ScheduleName,
        topology: Topology,
        hidden_size: int,
        compute_dtype: torch.dtype,
    ) -> None:
        self._chunks = chunks
        self._schedule = schedule
        self._topology = topology
        self._hidden_size = hidden_size
        self._compute_dtype = compute_dtype
        self._prepared: dict[_Shape, Any] = {}

    def train(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> Tensor:
        """See `MicroBatchRunner`."""
        for chunk in self._chunks:
            chunk.train()
        losses: list[Tensor] = []
        schedule, arguments, inputs = self._prepare(micro_batches, with_backward=True)
        target = count.expand(len(micro_batches))
        schedule.step(*arguments, target=target, losses=losses, return_outputs=False, **inputs)
        if not losses:
            return torch.zeros_like(count)
        return torch.stack(losses).sum().detach()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """See `MicroBatchRunner`."""
        for chunk in self._chunks:
            chunk.eval()
        schedule, arguments, inputs = self._prepare(micro_batches, with_backward=False)
        outputs = schedule.step(*arguments, **inputs)
        for chunk in self._chunks:
            free_gathered_weights(chunk)
        if outputs is None:
            device = self._topology.device
            return torch.zeros(_HEAD_OUTPUTS, dtype=torch.float64, device=device)
        assert isinstance(outputs, Tensor)
        return outputs.double().sum(0)

    def _prepare(
        self, micro_batches: Sequence[MicroBatch], *, with_backward: bool
    ) -> tuple[Any, tuple[Tensor, ...], dict[str, Tensor]]:
        """Return a schedule for these shapes and its arguments, positional and by name."""
        inputs = {
            name: torch.cat([micro_batch[name] for micro_batch in micro_batches])
            for name in micro_batches[0]
        }
        first = next(iter(inputs))
        shape = _Shape(len(micro_batches), micro_batches[0][first].shape, with_backward)
        if shape not in self._prepared:
            # Stages of other row lengths are gone through; their buffers go with them.
            self._prepared = {
                known: schedule
                for known, schedule in self._prepared.items()
                if known.with_backward != with_backward
            }
            self._prepared[shape] = self._make_schedule(shape, micro_batches[0][first])
        tokens = inputs.pop(first)
        arguments = (tokens,) if self._topology.pipeline_rank == 0 else ()
        return self._prepared[shape], arguments, inputs

    def _make_schedule(self, shape: _Shape, tokens_BS: Tensor) -> Any:
        """Set up the stages for one shape; told it, they ask no other rank for it."""
        loss = _divided_loss if shape.with_backward else None
        stages: list[Any] = [
            self._make_stage(number, tokens_BS) for number in range(len(self._chunks))
        ]
        if self._schedule == "1f1b":
            return Schedule1F1B(stages[0], shape.micro_batches, loss_fn=loss, scale_grads=False)
        kind = _INTERLEAVED[self._schedule]
        return kind(stages, shape.micro_batches, loss_fn=loss, scale_grads=False)

    def _make_stage(self, number: int, tokens_BS: Tensor) -> PipelineStage:
        topology = self._topology
        index = topology.pipeline_rank + number * topology.pipeline_size
        count = topology.pipeline_size * len(self._chunks)
        tp = topology.tensor_parallel
        tokens = tokens_BS.numel() // (tp.size if tp.shards_tokens else 1)
        hidden_TD = torch.empty(
            tokens, self._hidden_size, dtype=self._compute_dtype, device="meta", requires_grad=True
        )
        sums = torch.empty(1, _HEAD_OUTPUTS, dtype=torch.float32, device="meta")
        return PipelineStage(
            self._chunks[number],
            index,
            count,
            topology.device,
            input_args=(tokens_BS.to("meta") if index == 0 else hidden_TD,),
            output_args=(sums if index == count - 1 else hidden_TD,),
            group=topology.pipeline_group,
        )


def _divided_loss(sums: Tensor, count: Tensor) -> Tensor:
    """A micro-batch's share of the mean loss: what the head returns, and [1] the divisor."""
    return sums[0, 0] / count[0]
