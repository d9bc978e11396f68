"""What passes between the stages of neighbouring pipeline ranks: hidden states and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.distributed.topology import Topology
from megatron_bert.parallel.actions import Action, Kind


@dataclass(frozen=True)
class _Batch:
    """Messages that were started together.

    Attributes:
        works: PyTorch's handles of those that nobody has waited for yet.
        timeout: the longest wait for each; None leaves PyTorch's.
    """

    works: list[dist.Work]
    timeout: timedelta | None

    def wait(self) -> None:
        """Wait for all messages; on a GPU only later computations wait, not the host."""
        # Only once for each: a second time, gloo would wait for another message.
        while self.works:
            work = self.works.pop()
            if self.timeout is None:
                work.wait()
            else:
                work.wait(self.timeout)


class StageMessages:
    """This rank's end of the messages of one step, all of one shape.

    A message is posted when the schedule comes to it. The computation that uses a received message
    waits for it; a sent message is waited for when the next of its kind goes out. A receive buffer
    lives from its posting until the last computation that uses it lets go, so that there are no
    more buffers than micro-batches in flight.

    All messages go out in batches, even single ones: on its own, a message would go through another
    communicator, and the two sides, whose lists put different messages next to it, could disagree
    about which.

    Args:
        topology: the ranks.
        shape: of a message, [T, D].
        dtype: of a message.
    """

    def __init__(self, topology: Topology, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._group = topology.pipeline_group
        self._device = topology.device
        # gloo's group has a timeout, but its point-to-point messages do not take it over; on CUDA
        # the host would wait as well if given one.
        options = getattr(self._group._get_backend(self._device), "options", None)
        self._timeout: timedelta | None = None
        if self._device.type == "cpu" and options is not None:
            self._timeout = options._timeout
        self._shape = shape
        self._dtype = dtype
        self._received: dict[Action, tuple[_Batch, Tensor]] = {}
        # The latest by kind and stage: it arrived long before the next one goes out.
        self._sent: dict[tuple[Kind, int], tuple[_Batch, Tensor]] = {}

    def exchange(
        self, peer: int, actions: Sequence[Action], contents: dict[Action, Tensor]
    ) -> None:
        """Start sending and receiving these messages, all with one rank.

        Args:
            peer: the rank.
            actions: the messages.
            contents: tensors to send; those sent are removed from it.
        """
        sent = {action: contents.pop(action) for action in actions if action.is_sent}
        received = {action: self._buffer() for action in actions if not action.is_sent}
        operations = [
            dist.P2POp(dist.isend, sent[action].detach(), group=self._group, group_peer=peer)
            if action.is_sent
            else dist.P2POp(dist.irecv, received[action], group=self._group, group_peer=peer)
            for action in actions
        ]
        batch = _Batch(dist.batch_isend_irecv(operations), self._timeout)
        for action, tensor in received.items():
            self._received[action] = batch, tensor
        for action, tensor in sent.items():
            self._release(action.kind, action.stage)
            self._sent[action.kind, action.stage] = batch, tensor

    def take(self, action: Action) -> Tensor:
        """Wait for a message and hand over what it brought."""
        batch, tensor = self._received.pop(action)
        batch.wait()
        return tensor

    def close(self) -> None:
        """Wait for messages that are still in flight."""
        assert not self._received, "received, but used by no computation"
        for kind, stage in list(self._sent):
            self._release(kind, stage)

    def _release(self, kind: Kind, stage: int) -> None:
        """Wait for the latest message of this kind and stage to arrive, and free its data."""
        if (kind, stage) in self._sent:
            batch, tensor = self._sent.pop((kind, stage))
            batch.wait()
            if kind is Kind.SEND_ACTIVATION:
                # The backward pass starts from this tensor, but needs no more than its shape.
                tensor.data = tensor.new_empty(()).expand(tensor.shape)

    def _buffer(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)
