"""Steps through a pipeline of a few ranks, against the same stages one after another."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bert.config.pipeline_schedules import ScheduleName
from megatron_bert.parallel.data_parallel import ShardedModel
from megatron_bert.parallel.micro_batches import HeadOutput, MicroBatch
from megatron_bert.parallel.pipeline import Pipeline
from megatron_bert.parallel.stage_messages import StageMessages
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology

WIDTH, VOCABULARY, ROWS = 6, 11, 2
SCHEDULES = [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 2)]


class _Stage(nn.Module):
    """Embeddings, a residual layer, a loss, or but the second of them."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(number)
        self.embedding = None
        if number == 0:
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.is_last = number == count - 1
        for parameter in self.parameters():
            parameter.data.normal_(std=0.5, generator=random)

    def forward(self, inputs: Tensor, targets_BS: Tensor) -> Tensor | HeadOutput:
        x_TD = inputs if self.embedding is None else self.embedding(inputs.flatten())
        x_TD = x_TD + torch.tanh(self.layer(x_TD))
        if not self.is_last:
            return x_TD
        errors_T = x_TD.sum(1) - targets_BS.flatten()
        return HeadOutput(errors_T.square().sum(), (errors_T > 0).float())


def _micro_batches(count: int, slots: int) -> list[MicroBatch]:
    random = torch.Generator().manual_seed(count * 100 + slots)
    return [
        (
            torch.randint(VOCABULARY, (ROWS, slots), generator=random),
            torch.randn(ROWS, slots, generator=random),
        )
        for _ in range(count)
    ]


def _pipeline(schedule: ScheduleName, ranks: int, virtual: int) -> tuple[Pipeline, list[_Stage]]:
    topology = cpu_topology(pipeline=ranks)
    count = ranks * virtual
    chunks = [_Stage(number, count) for number in range(topology.pipeline_rank, count, ranks)]
    sharded = [ShardedModel(chunk, [chunk.layer], topology, torch.float32) for chunk in chunks]
    runner = Pipeline(sharded, schedule, topology, WIDTH, torch.float32)
    return runner, chunks


def _one_after_another(
    count: int, micro_batches: list[MicroBatch], divisor: Tensor
) -> tuple[list[_Stage], Tensor, list[HeadOutput]]:
    """The stages with their gradients, the loss, and the head's output of each micro-batch."""
    stages = [_Stage(number, count) for number in range(count)]
    outputs: list[HeadOutput] = []
    for tokens, targets in micro_batches:
        x = tokens
        for stage in stages:
            x = stage(x, targets)
        (x.loss / divisor).backward()
        outputs.append(HeadOutput(x.loss.detach(), x.correct_N))
    return stages, torch.stack([output.loss for output in outputs]).sum() / divisor, outputs


def _check_evaluation(
    runner: Pipeline, micro_batches: list[MicroBatch], outputs: list[HeadOutput]
) -> None:
    """The last rank has the outputs of all micro-batches in their order, the others none."""
    expected = outputs if dist.get_rank() == dist.get_world_size() - 1 else []
    torch.testing.assert_close(runner.evaluate(micro_batches), expected, rtol=1e-5, atol=1e-5)


def _check_steps(schedule: ScheduleName, ranks: int, virtual: int) -> None:
    runner, chunks = _pipeline(schedule, ranks, virtual)
    count, divisor = ranks * virtual, torch.tensor(7.0)
    is_last = dist.get_rank() == ranks - 1
    # Rows of another length, then other numbers of micro-batches, in mid-run and back.
    for number, slots in ((2, 5), (2, 9), (3, 9), (1, 5), (2, 5)):
        micro_batches = _micro_batches(number * ranks, slots)
        stages, loss, outputs = _one_after_another(count, micro_batches, divisor)
        found = runner.train(micro_batches, divisor)
        torch.testing.assert_close(found, loss if is_last else torch.zeros(()))
        assert not found.requires_grad
        for chunk, stage in zip(chunks, stages[dist.get_rank() :: ranks], strict=True):
            assert chunk.training
            for (name, p), reference in zip(
                chunk.named_parameters(), stage.parameters(), strict=True
            ):
                assert isinstance(p.grad, DTensor), name
                torch.testing.assert_close(p.grad.full_tensor(), reference.grad)
                p.grad = None
        _check_evaluation(runner, micro_batches, outputs)
        assert not any(chunk.training for chunk in chunks)


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_steps_are_those_of_the_stages_one_after_another(
    ranks: int, schedule: ScheduleName, virtual: int
) -> None:
    run_ranks(ranks, _check_steps, schedule, ranks, virtual)


def _check_evaluation_of_few(ranks: int, virtual: int) -> None:
    runner, _ = _pipeline("interleaved", ranks, virtual)
    for number in (1, 2, 5):
        micro_batches = _micro_batches(number, 4)
        _, _, outputs = _one_after_another(ranks * virtual, micro_batches, torch.tensor(1.0))
        _check_evaluation(runner, micro_batches, outputs)


def test_evaluation_takes_any_number_of_micro_batches() -> None:
    run_ranks(3, _check_evaluation_of_few, 3, 2)


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Counts receive buffers, the most of them that lived at a time, and messages by their op."""
    counts: Counter[str] = Counter()
    make_buffer, begin = StageMessages._buffer, dist.batch_isend_irecv

    def counted_buffer(mail: Any) -> Tensor:
        buffer = make_buffer(mail)
        counts["made"] += 1
        counts["alive"] += 1
        counts["most"] = max(counts["most"], counts["alive"])
        # The data, not the tensor: views share it.
        weakref.finalize(buffer.untyped_storage(), counts.subtract, ["alive"])
        return buffer

    def counted_begin(operations: list[dist.P2POp]) -> list[dist.Work]:
        counts.update(operation.op.__name__ for operation in operations)
        counts["batches"] += 1
        return begin(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageMessages, "_buffer", counted_buffer)
        patch.setattr(dist, "batch_isend_irecv", counted_begin)
        yield counts


def _count_step(
    schedule: ScheduleName, ranks: int, virtual: int, micro_batches: int, train: bool
) -> Counter[str]:
    runner, _ = _pipeline(schedule, ranks, virtual)
    with _counted() as counts:
        if train:
            runner.train(_micro_batches(micro_batches, 5), torch.tensor(1.0))
        else:
            runner.evaluate(_micro_batches(micro_batches, 5))
    return counts


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_receive_buffers_are_as_many_as_are_in_flight(schedule: ScheduleName, virtual: int) -> None:
    ranks = 3
    few, many = (
        run_ranks(ranks, _count_step, schedule, ranks, virtual, micro_batches, True)
        for micro_batches in (6, 24)
    )
    for rank in range(ranks):
        ahead = ranks - 1 - (0 if schedule == "zero_bubble" else rank)
        in_flight = ahead + 1 if virtual == 1 else 2 * ahead + (virtual - 1) * ranks + 1
        # And what the neighbours send ahead of its use, in either direction.
        assert few[rank]["most"] <= in_flight + 2 * (ranks - 1)
        assert many[rank]["most"] == few[rank]["most"]
        assert many[rank]["made"] == many[rank]["irecv"]
        assert many[rank]["alive"] == 0


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_one_message_a_boundary_micro_batch_and_direction(
    schedule: ScheduleName, virtual: int
) -> None:
    ranks, micro_batches = 2, 8
    boundaries = ranks * virtual - 1
    counts = run_ranks(ranks, _count_step, schedule, ranks, virtual, micro_batches, True)
    assert sum(c["isend"] for c in counts) == 2 * boundaries * micro_batches
    assert sum(c["irecv"] for c in counts) == 2 * boundaries * micro_batches
    # Opposite ones go together.
    assert all(c["batches"] < c["isend"] + c["irecv"] for c in counts)
    counts = run_ranks(ranks, _count_step, schedule, ranks, virtual, micro_batches, False)
    assert sum(c["isend"] for c in counts) == boundaries * micro_batches
    assert sum(c["irecv"] for c in counts) == boundaries * micro_batches


def _most_outputs(micro_batches: int) -> int:
    runner, (chunk,) = _pipeline("1f1b", 3, 1)
    alive = most = 0

    def end() -> None:
        nonlocal alive
        alive -= 1

    def begin(_module: nn.Module, _inputs: Any, output: Tensor | HeadOutput) -> None:
        nonlocal alive, most
        if not isinstance(output, Tensor):
            return
        alive += 1
        most = max(most, alive)
        weakref.finalize(output.untyped_storage(), end)

    chunk.register_forward_hook(begin)
    runner.train(_micro_batches(micro_batches, 5), torch.tensor(1.0))
    return most


def test_a_sent_output_gives_up_its_data_before_its_backward() -> None:
    # Rank 0 has three micro-batches in flight; one is under way while the next is made.
    assert run_ranks(3, _most_outputs, 6)[:2] == [2, 2]


class _Collectives(TorchDispatchMode):
    """Notes the names of the operators that send, receive and reduce, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def _record_step(schedule: ScheduleName, virtual: int) -> list[str]:
    runner, _ = _pipeline(schedule, 2, virtual)
    with _Collectives() as collectives:
        runner.train(_micro_batches(6, 5), torch.tensor(1.0))
    return collectives.names


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_gradients_are_reduced_once_and_under_each_stages_last_backward(
    schedule: ScheduleName, virtual: int
) -> None:
    # Two pipelines of two ranks.
    for rank, names in enumerate(run_ranks(4, _record_step, schedule, virtual)):
        reductions = [n for n, name in enumerate(names) if name.startswith("_reduce_scatter")]
        has_embedding = rank < 2
        assert len(reductions) == virtual + has_embedding
        # All of a stage's is behind it by the time that its last gradient goes out; zero bubble
        # comes to it when all has gone out.
        if not has_embedding and schedule != "zero_bubble":
            assert "send" in names[reductions[-1] :]
