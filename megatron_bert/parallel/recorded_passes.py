"""Passes through the model that are recorded once and replayed for every micro-batch.

What a micro-batch of few tokens costs the host, some hundred launches a layer, is more than what it
costs a GPU. A CUDA graph of the whole pass, forward and backward, is launched at once; it computes
the same operators on the same addresses, so that inputs are copied to where they were, weights are
gathered to where they were, and gradients are added up where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from megatron_bert.parallel.data_parallel import ShardedModel
from megatron_bert.parallel.micro_batches import MicroBatch, WholeModel

# Before a recording: kernels are compiled, and libraries take what memory they work in.
_WARM_UP_PASSES = 2

Pass: TypeAlias = Callable[[], Tensor]


class Recording(Protocol):
    """Operators that were recorded with the tensors that they read and write."""

    def replay(self) -> None:
        """Run them again."""
        ...


Recorder: TypeAlias = Callable[[Pass], tuple[Recording, Tensor]]
"""Records a pass; returns the recording and the tensor to which it writes what the pass returns.

What the pass writes elsewhere may hold anything after that.
"""


def record_cuda_graph(run: Pass) -> tuple[Recording, Tensor]:
    """Record a pass on the current device as a CUDA graph, which keeps its activations' memory."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_PASSES):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    # A graph has memory of its own: what these passes had is free by now.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    # Threads that read rows and write checkpoints call CUDA meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = run()
    return graph, output


class RecordedModel(WholeModel):
    """The model on this rank, whose training passes are replayed.

    Gradients are reduced behind the last pass, not beside it.

    Args:
        model: see `WholeModel`; its gathered weights stay where they are from step to step.
        record: makes recordings.
    """

    def __init__(self, model: ShardedModel[Any], record: Recorder = record_cuda_graph) -> None:
        super().__init__(model)
        self._record = record
        self._passes: _Passes | None = None

    def train(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> Tensor:
        """See `MicroBatchRunner`."""
        self.model.module.train()
        self.model.begin(len(micro_batches), keeps_sums=True)
        self.model.gather()
        if self._passes is None or not self._passes.take(micro_batches[0]):
            # The memory of those that were recorded for other shapes, before new ones take theirs.
            self._passes = None
            self._passes = _Passes(self.model, micro_batches[0], count, self._record)
            self.model.clear_sums()
        loss = torch.zeros_like(count)
        for micro_batch in micro_batches:
            loss += self._passes.run(micro_batch, count)
        self.model.end()
        return loss


class _Passes:
    """A recording for micro-batches of one shape."""

    def __init__(
        self, model: ShardedModel[Any], micro_batch: MicroBatch, count: Tensor, record: Recorder
    ) -> None:
        self._inputs = tuple(x.clone() for x in micro_batch)
        self._count = count.clone()

        def run() -> Tensor:
            share: Tensor = model.module(*self._inputs)[0, 0] / self._count
            share.backward()  # type: ignore[no-untyped-call]
            return share.detach()

        self._recording, self._loss = record(run)

    def take(self, micro_batch: MicroBatch) -> bool:
        """Whether they serve for a micro-batch."""
        return all(
            (x.shape, x.dtype) == (own.shape, own.dtype)
            for x, own in zip(micro_batch, self._inputs, strict=True)
        )

    def run(self, micro_batch: MicroBatch, count: Tensor) -> Tensor:
        """Add the micro-batch's gradients to the sums; the loss stands until the next run."""
        for own, x in zip((*self._inputs, self._count), (*micro_batch, count), strict=True):
            own.copy_(x)
        self._recording.replay()
        return self._loss
