"""Pipeline parallelism: a step through the stages that this rank holds.

`parallel.schedule` gives the order. Every rank makes the same rows itself, so that only hidden
states travel to the next stage and only their gradients travel back. All have one shape, [T, D],
and the compute dtype: the T tokens of a micro-batch that a rank holds, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_bert.config.pipeline_schedules import SCHEDULES, ScheduleName
from megatron_bert.distributed.topology import Topology
from megatron_bert.parallel.actions import Action, Kind
from megatron_bert.parallel.data_parallel import ShardedModel
from megatron_bert.parallel.deferred import (
    accumulate_deferred,
    defer_weight_gradients,
    dropping_deferred,
)
from megatron_bert.parallel.micro_batches import HeadOutput, MicroBatch
from megatron_bert.parallel.schedule import (
    Schedule,
    make_forward_schedule,
    make_schedule,
)
from megatron_bert.parallel.stage_messages import StageMessages


class Pipeline:
    """This rank's stages of a model that several ranks hold, and the order of their work.

    Attributes:
        chunks: the stages that this rank holds: stage r, r + p, r + 2p, ... of rank r of p.

    Args:
        chunks: the same.
        schedule: the order of the micro-batches.
        topology: the ranks.
        hidden_size: width of the hidden states that travel between stages.
        compute_dtype: their dtype.
    """

    def __init__(
        self,
        chunks: Sequence[ShardedModel[Any]],
        schedule: ScheduleName,
        topology: Topology,
        hidden_size: int,
        compute_dtype: torch.dtype,
    ) -> None:
        self.chunks = chunks
        self._schedule: ScheduleName = schedule
        self._topology = topology
        self._hidden_size = hidden_size
        self._compute_dtype = compute_dtype
        # Keyed by the number of micro-batches, which is the same throughout a curriculum stage.
        self._training: dict[int, Schedule] = {}
        self._evaluation: dict[int, Schedule] = {}
        if SCHEDULES[schedule].splits_backward:
            for chunk in chunks:
                defer_weight_gradients(chunk)

    def train(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> Tensor:
        """See `MicroBatchRunner`."""
        for chunk in self.chunks:
            chunk.module.train()
        number, ranks, stages = self._sizes(micro_batches)
        if number not in self._training:
            self._training[number] = make_schedule(self._schedule, ranks, number, stages)
        shares: list[Tensor] = []

        def derived(output: HeadOutput) -> Tensor:
            share = output.loss / count
            shares.append(share.detach())
            return share

        self._run(self._training[number], micro_batches, derived)
        return torch.stack(shares).sum() if shares else torch.zeros_like(count)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[HeadOutput]:
        """See `MicroBatchRunner`."""
        for chunk in self.chunks:
            chunk.module.eval()
        number, ranks, stages = self._sizes(micro_batches)
        if number not in self._evaluation:
            self._evaluation[number] = make_forward_schedule(ranks, number, stages)
        outputs: list[HeadOutput] = []
        self._run(self._evaluation[number], micro_batches, outputs.append)
        return outputs

    def _sizes(self, micro_batches: Sequence[MicroBatch]) -> tuple[int, int, int]:
        return len(micro_batches), self._topology.pipeline_size, len(self.chunks)

    def _run(
        self,
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        finish: Callable[[HeadOutput], Tensor | None],
    ) -> None:
        tp = self._topology.tensor_parallel
        tokens = micro_batches[0][0].numel()
        tokens //= tp.size if tp.shards_tokens else 1
        messages = StageMessages(self._topology, (tokens, self._hidden_size), self._compute_dtype)
        actions = schedule.actions[self._topology.pipeline_rank]
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(dropping_deferred(chunk))
                stack.enter_context(
                    chunk.step(len(micro_batches) if torch.is_grad_enabled() else 0)
                )
            _Step(self.chunks, schedule, micro_batches, finish, messages).run(actions)


class _Step:
    """One step's micro-batches on their way through this rank's stages.

    Args:
        chunks: the stages.
        schedule: the schedule that the actions belong to.
        micro_batches: all of the step.
        finish: takes the head's output and, in training, returns what is differentiated.
        messages: carries tensors between ranks.
    """

    def __init__(
        self,
        chunks: Sequence[ShardedModel[Any]],
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        finish: Callable[[HeadOutput], Tensor | None],
        messages: StageMessages,
    ) -> None:
        self._chunks = chunks
        self._num_ranks = schedule.num_ranks
        # If so, gradients are complete only after the weights' part of a backward pass.
        self._splits_backward = any(
            action.kind is Kind.BACKWARD_WEIGHT for action in schedule.actions[0]
        )
        self._last_stage = schedule.num_stages - 1
        self._micro_batches = micro_batches
        self._finish = finish
        self._messages = messages
        # Keyed by stage and micro-batch, kept from the forward pass to the backward pass.
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        # Kept from the computation to the message that sends it.
        self._to_send: dict[Action, Tensor] = {}

    def run(self, actions: Sequence[Action]) -> None:
        """Perform the actions in order."""
        for peer, group in groupby(actions, self._peer):
            if peer is None:
                for action in group:
                    self._compute(action)
            else:
                # Consecutive messages with one peer travel in both directions at once.
                self._messages.exchange(peer, list(group), self._to_send)
        self._messages.close()

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
        chunk = self._chunks[stage // self._num_ranks]
        is_last = micro_batch == len(self._micro_batches) - 1
        if is_last and with_backward and not self._splits_backward:
            # A stage takes the micro-batches in order.
            chunk.begin_last_pass()
        output = chunk.module(inputs, *others)
        if stage == self._last_stage:
            output = self._finish(output)
        else:
            self._to_send[Action(Kind.SEND_ACTIVATION, stage, micro_batch)] = output
        if with_backward:
            self._outputs[stage, micro_batch] = output

    def _backward(self, action: Action) -> None:
        if action.kind is not Kind.BACKWARD_WEIGHT:
            self._backward_to_input(action.stage, action.micro_batch)
            return
        is_last = action.micro_batch == len(self._micro_batches) - 1
        accumulate_deferred(self._chunks[action.stage // self._num_ranks], reduces=is_last)

    def _backward_to_input(self, stage: int, micro_batch: int) -> None:
        gradient = None
        if stage < self._last_stage:
            gradient = self._messages.take(Action(Kind.RECEIVE_GRADIENT, stage, micro_batch))
        torch.autograd.backward(self._outputs.pop((stage, micro_batch)), gradient)
        if stage > 0:
            input_gradient = self._inputs.pop((stage, micro_batch)).grad
            assert input_gradient is not None
            self._to_send[Action(Kind.SEND_GRADIENT, stage, micro_batch)] = input_gradient
