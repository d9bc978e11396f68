"""Pipeline parallelism: a step through the stages that this rank holds.

`parallel.schedule` says in what order. Every rank makes the same rows itself, so that only hidden
states travel between stages and only their gradients back, all of one shape, [T, D] of the compute
type: the T tokens of a micro-batch that a rank holds, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from megatron_bert.distributed.topology import Topology
from megatron_bert.parallel.actions import Action, Kind
from megatron_bert.parallel.data_parallel import free_gathered_weights, set_gradient_sync
from megatron_bert.parallel.deferred import accumulate_deferred, defer_weight_gradients
from megatron_bert.parallel.micro_batches import MicroBatch
from megatron_bert.parallel.schedule import (
    Schedule,
    ScheduleName,
    make_forward_schedule,
    make_schedule,
)
from megatron_bert.parallel.stage_messages import StageMessages


class Pipeline:
    """This rank's stages of a model that several ranks hold, and the order of their work.

    Args:
        chunks: the stages that this rank holds, each sharded over data: stage r, r + p, r + 2p, ...
            of rank r of p.
        schedule: the order of the micro-batches.
        topology: the ranks.
        hidden_size: width of what travels between stages.
        compute_dtype: its type.
        reshard_after_forward: as the chunks were sharded.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        schedule: ScheduleName,
        topology: Topology,
        hidden_size: int,
        compute_dtype: torch.dtype,
        *,
        reshard_after_forward: bool,
    ) -> None:
        self._chunks = chunks
        self._schedule: ScheduleName = schedule
        self._topology = topology
        self._hidden_size = hidden_size
        self._compute_dtype = compute_dtype
        self._reshard_always = reshard_after_forward
        # By what they were made for: steps of a stage of the curriculum have one number.
        self._training: dict[int, Schedule] = {}
        self._evaluation: dict[int, Schedule] = {}
        if schedule == "zero_bubble":
            for chunk in chunks:
                defer_weight_gradients(chunk)

    def train(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> Tensor:
        """See `MicroBatchRunner`."""
        for chunk in self._chunks:
            chunk.train()
        number, ranks, stages = self._sizes(micro_batches)
        if number not in self._training:
            self._training[number] = make_schedule(self._schedule, ranks, number, stages)
        losses = self._run(self._training[number], micro_batches, lambda sums: sums[0, 0] / count)
        return torch.stack(losses).sum() if losses else torch.zeros_like(count)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See `MicroBatchRunner`."""
        for chunk in self._chunks:
            chunk.eval()
        number, ranks, stages = self._sizes(micro_batches)
        if number not in self._evaluation:
            self._evaluation[number] = make_forward_schedule(ranks, number, stages)
        outputs = self._run(self._evaluation[number], micro_batches, lambda sums: sums)
        for chunk in self._chunks:
            free_gathered_weights(chunk)
        return outputs

    def _sizes(self, micro_batches: Sequence[MicroBatch]) -> tuple[int, int, int]:
        return len(micro_batches), self._topology.pipeline_size, len(self._chunks)

    def _run(
        self,
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        finish: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        tp = self._topology.tensor_parallel
        tokens = micro_batches[0][0].numel()
        tokens //= tp.size if tp.shards_tokens else 1
        messages = StageMessages(self._topology, (tokens, self._hidden_size), self._compute_dtype)
        step = _Step(
            self._chunks,
            schedule,
            micro_batches,
            finish,
            messages,
            reshard_always=self._reshard_always,
        )
        return step.run(schedule.actions[self._topology.pipeline_rank])


class _Step:
    """One step's micro-batches on their way through this rank's stages.

    Args:
        chunks: the stages.
        schedule: what the actions are of.
        micro_batches: all of the step.
        finish: makes of the head's output what is returned, and in training derived.
        messages: carries what passes between ranks.
        reshard_always: free gathered weights after every backward pass, not only the last.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        finish: Callable[[Tensor], Tensor],
        messages: StageMessages,
        *,
        reshard_always: bool,
    ) -> None:
        self._chunks = chunks
        self._num_ranks = schedule.num_ranks
        self._last_stage = schedule.num_stages - 1
        self._micro_batches = micro_batches
        self._finish = finish
        self._messages = messages
        self._reshard_always = reshard_always
        self._results: list[Tensor] = []
        # By stage and micro-batch, from the forward pass to the backward pass.
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        # From the computation to the message.
        self._to_send: dict[Action, Tensor] = {}

    def run(self, actions: Sequence[Action]) -> list[Tensor]:
        """Take the actions; returns what was finished, of each micro-batch, without gradient."""
        for peer, group in groupby(actions, self._peer):
            if peer is None:
                for action in group:
                    self._compute(action)
            else:
                # What stands side by side passes in both directions at once.
                self._messages.exchange(peer, list(group), self._to_send)
        self._messages.close()
        return self._results

    def _peer(self, action: Action) -> int | None:
        return action.peer(self._num_ranks) if action.is_message else None

    def _compute(self, action: Action) -> None:
        if action.kind is Kind.FORWARD:
            self._forward(action.stage, action.micro_batch)
        else:
            self._backward(action)

    def _forward(self, stage: int, micro_batch: int) -> None:
        inputs, *others = self._micro_batches[micro_batch]
        with_backward = torch.is_grad_enabled()
        if stage > 0:
            inputs = self._messages.take(Action(Kind.RECEIVE_ACTIVATION, stage, micro_batch))
            if with_backward:
                self._inputs[stage, micro_batch] = inputs.requires_grad_()
        output = self._chunks[stage // self._num_ranks](inputs, *others)
        if stage == self._last_stage:
            output = self._finish(output)
            self._results.append(output.detach())
        else:
            self._to_send[Action(Kind.SEND_ACTIVATION, stage, micro_batch)] = output
        if with_backward:
            self._outputs[stage, micro_batch] = output

    def _backward(self, action: Action) -> None:
        chunk = self._chunks[action.stage // self._num_ranks]
        # A stage takes the micro-batches in order. Gradients are reduced under the last pass.
        is_last = (
            action.kind is not Kind.BACKWARD_INPUT
            and action.micro_batch == len(self._micro_batches) - 1
        )
        set_gradient_sync(chunk, is_last, reshard=is_last or self._reshard_always)
        if action.kind is Kind.BACKWARD_WEIGHT:
            accumulate_deferred(chunk)
        else:
            self._backward_to_input(action.stage, action.micro_batch)

    def _backward_to_input(self, stage: int, micro_batch: int) -> None:
        gradient = None
        if stage < self._last_stage:
            gradient = self._messages.take(Action(Kind.RECEIVE_GRADIENT, stage, micro_batch))
        torch.autograd.backward(self._outputs.pop((stage, micro_batch)), gradient)
        if stage > 0:
            input_gradient = self._inputs.pop((stage, micro_batch)).grad
            assert input_gradient is not None
            self._to_send[Action(Kind.SEND_GRADIENT, stage, micro_batch)] = input_gradient
