"""Passes through the model that are recorded once and replayed for every micro-batch.

A micro-batch of few tokens costs the host, with some hundred launches per layer, more time than it
costs a GPU. The pass is therefore recorded as CUDA graphs, one per unit and direction (forward and
backward). They run the same operators on the same addresses, so that inputs are copied, weights
gathered and gradients accumulated where they were in the recording. Between the graphs the host
gathers weights and reduces gradients as it does without them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.distributed.device_work import wait_for_step, work_point
from megatron_bert.errors import ConfigError
from megatron_bert.parallel.data_parallel import ShardedModel
from megatron_bert.parallel.micro_batches import HeadOutput, MicroBatch, WholeModel

# Run before a recording, so that kernels are compiled and libraries allocate their workspaces.
_WARM_UP_PASSES = 2


class Recorder(Protocol):
    """Records the operators of a pass, one stretch at a time.

    Memory allocated before a stretch that its operators write to may hold anything afterwards.
    """

    def begin(self) -> None:
        """Begin a stretch."""
        ...

    def end(self) -> Callable[[], None]:
        """End the stretch; return a function that runs its operators again on the same tensors."""
        ...


Recording: TypeAlias = Callable[[], AbstractContextManager[Recorder]]
"""Yields a recorder; passes run inside the block, the first few of them unrecorded."""


class _GraphRecorder:
    """A `Recorder` whose stretches are CUDA graphs, which share the memory of activations."""

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        self._device, self._timeout = device, timeout_seconds
        self._pool: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        if self._pool is None:
            # Graphs take memory of their own: free what earlier passes had, and graphs of other
            # shapes that wait for the garbage collector.
            gc.collect()
            # Freeing it waits for the device, which may wait for a rank that is gone.
            wait_for_step(work_point(self._device), self._timeout)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        # Threads that read rows and write checkpoints call CUDA meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        return graph.replay

    def drop(self) -> None:
        """End a stretch that an exception has left open."""
        if self._graph is not None:
            # It may be invalid by now, and the exception says why.
            with suppress(RuntimeError):
                self._graph.capture_end()


class CudaGraphs:
    """Recordings on a device, all on one stream, as libraries keep memory for each stream.

    Args:
        device: the current device.
        timeout_seconds: how long the device may take to finish the work it was given before.
    """

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        self._device, self._timeout = device, timeout_seconds
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def __call__(self) -> Iterator[Recorder]:
        """See `Recording`."""
        stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream = stream
        stream.wait_stream(torch.cuda.current_stream())
        recorder = _GraphRecorder(self._device, self._timeout)
        with torch.cuda.stream(stream):
            try:
                yield recorder
            finally:
                recorder.drop()
        torch.cuda.current_stream().wait_stream(stream)


class RecordedModel(WholeModel):
    """The model on this rank, whose training passes are replayed.

    Args:
        model: see `WholeModel`; its gathered weights stay where they are from step to step.
        recording: how passes are recorded.
    """

    def __init__(self, model: ShardedModel[Any], recording: Recording) -> None:
        super().__init__(model)
        self._recording = recording
        self._passes: _Passes | None = None

    def train(self, micro_batches: Sequence[MicroBatch], count: Tensor) -> Tensor:
        """See `MicroBatchRunner`.

        Raises:
            ConfigError: the passes of such micro-batches cannot be recorded here.
        """
        self.model.module.train()
        loss = torch.zeros_like(count)
        with _memory_noted(), self.model.step(len(micro_batches), keeps_sums=True):
            if self._passes is None or not self._passes.take(micro_batches[0]):
                # Free the passes for other shapes before new ones take their memory.
                self._passes = None
                self._passes = _Passes(self.model, micro_batches[0], count, self._recording)
                self.model.clear_sums()
            for index, micro_batch in enumerate(micro_batches):
                if index == len(micro_batches) - 1:
                    self.model.begin_last_pass()
                loss += self._passes.run(micro_batch, count)
        return loss

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[HeadOutput]:
        """See `MicroBatchRunner`; launched, not replayed."""
        with _memory_noted():
            return super().evaluate(micro_batches)


class _Passes:
    """A recording for micro-batches of one shape; making it leaves garbage in the gradient sums.

    Args:
        model: the model that they go through.
        micro_batch: one of that shape.
        count: what its summed loss is divided by.
        recording: see `RecordedModel`.

    Raises:
        ConfigError: see `RecordedModel.train`.
    """

    def __init__(
        self,
        model: ShardedModel[Any],
        micro_batch: MicroBatch,
        count: Tensor,
        recording: Recording,
    ) -> None:
        self._inputs = tuple(x.clone() for x in micro_batch)
        self._count = count.clone()
        model.gather()
        with recording() as recorder:
            for _ in range(_WARM_UP_PASSES):
                _Stretches(model, None).run(self._inputs, self._count)
            stretches = _Stretches(model, recorder)
            with _failure_named():
                self._loss = stretches.run(self._inputs, self._count)
        self._steps = stretches.steps

    def take(self, micro_batch: MicroBatch) -> bool:
        """Whether these passes can serve a micro-batch."""
        return all(
            (x.shape, x.dtype) == (own.shape, own.dtype)
            for x, own in zip(micro_batch, self._inputs, strict=True)
        )

    def run(self, micro_batch: MicroBatch, count: Tensor) -> Tensor:
        """Add the micro-batch's gradients to the sums; the loss is valid until the next run."""
        for own, x in zip((*self._inputs, self._count), (*micro_batch, count), strict=True):
            own.copy_(x)
        for step in self._steps:
            step()
        return self._loss


@contextmanager
def _failure_named() -> Iterator[None]:
    """Turn an error during a recording into one that names the key that turns recording off.

    The unrecorded passes before it have shown that the model itself works.

    Raises:
        ConfigError: something cannot be recorded here. A lack of memory is raised unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        # A rank that is gone is reported elsewhere.
        if _lacks_memory(error) or isinstance(error, dist.DistError):
            raise
        what = str(error).strip().partition("\n")[0]
        raise ConfigError(
            "compile.cuda_graphs: passes cannot be recorded here "
            f"({type(error).__name__}: {what}); use compile.cuda_graphs=false"
        ) from error


@contextmanager
def _memory_noted() -> Iterator[None]:
    """Add to an out-of-memory error a note about the memory that recorded passes take."""
    try:
        yield
    except RuntimeError as error:
        if _lacks_memory(error):
            error.add_note(
                "recorded passes, and the sums of their gradients, keep their memory from step to "
                "step: compile.cuda_graphs=false takes less"
            )
        raise


def _lacks_memory(error: RuntimeError) -> bool:
    # Out-of-memory errors of the driver and of libraries have no class of their own.
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


class _Stretches:
    """A pass that is cut before each unit in forward and after each unit in backward.

    Attributes:
        steps: what replays the pass: its stretches, and what the host does between them.

    Args:
        model: the model that it goes through.
        recorder: records the stretches; None to run them without recording.
    """

    def __init__(self, model: ShardedModel[Any], recorder: Recorder | None) -> None:
        self.steps: list[Callable[[], None]] = []
        self._model = model
        self._recorder = recorder
        # A unit, its original input, and the leaf that replaced that input.
        self._cuts: list[tuple[nn.Module, Tensor, Tensor]] = []

    def run(self, inputs: MicroBatch, count: Tensor) -> Tensor:
        """Return the pass's loss / count; its gradients are added to the sums."""
        model = self._model
        self._begin(partial(model.gather_for, model.module))
        with model.cut_by(self._cut):
            share: Tensor = model.module(*inputs).loss / count
        share.backward()  # type: ignore[no-untyped-call]
        while self._cuts:
            unit, x, leaf = self._cuts.pop()
            self._end()
            self._begin(partial(model.end_backward, unit))
            x.backward(leaf.grad)  # type: ignore[no-untyped-call]
            # Free their memory for the next stretch.
            del x, leaf
        self._end()
        return share.detach()

    def _cut(self, unit: nn.Module, x: Tensor) -> Tensor:
        self._end()
        leaf = x.detach().requires_grad_()
        self._cuts.append((unit, x, leaf))
        self._begin(partial(self._model.gather_for, unit))
        return leaf

    def _begin(self, ahead: Callable[[], None]) -> None:
        self.steps.append(ahead)
        if self._recorder is not None:
            self._recorder.begin()

    def _end(self) -> None:
        if self._recorder is not None:
            self.steps.append(self._recorder.end())
