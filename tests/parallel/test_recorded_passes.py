"""Recorded passes: losses and gradients are those of passes that are run, for all that changes.

A CUDA graph is stood for by a tape: the operators of a pass, which are run again on the tensors
that it had. Like a graph it knows nothing of what Python did between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bert.config.kernels import ComputeDevice
from megatron_bert.distributed.device_work import DeviceStalledError, HostPoint
from megatron_bert.errors import ConfigError
from megatron_bert.model import build
from megatron_bert.model.build import RankModel
from megatron_bert.parallel import recorded_passes
from megatron_bert.parallel.micro_batches import MicroBatch, WholeModel
from megatron_bert.parallel.recorded_passes import RecordedModel
from megatron_bert.training.optimizer import build_optimizer
from tests.distributed_harness import run_ranks
from tests.small_model import (
    cpu_topology,
    packed_inputs,
    small_config,
    small_model,
)

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


# Numbers that are read back, sizes that follow from contents, tensors made of the host's numbers,
# and what draws from a generator.
_UNRECORDABLE = re.compile(
    r"::(_local_scalar_dense|nonzero|masked_select|_?unique|lift_fresh|is_nonzero|equal"
    r"|rand|normal|bernoulli|native_dropout|repeat_interleave)"
)


class _Tape(TorchDispatchMode):
    """What a pass called, and where the results are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func.namespace not in ("c10d", "_c10d_functional"), "a message"
        assert not _UNRECORDABLE.search(func.name()), "the host waits, or nothing is drawn anew"
        assert not any(
            isinstance(x, Tensor) and x.dtype == torch.bool
            for x in tree_leaves([args, kwargs])
            if "::index" in func.name()
        ), "a mask whose count the host waits for"
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if any(returned.alias_info for returned in func._schema.returns):
                continue  # a view of what is there, or written in place
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class _Tapes:
    """A recorder of tapes, which counts them."""

    def __init__(self) -> None:
        self.made = 0
        self._tape = _Tape()

    def begin(self) -> None:
        self._tape = _Tape()
        self._tape.__enter__()

    def end(self) -> Callable[[], None]:
        self._tape.__exit__(None, None, None)
        assert self._tape.calls, "an empty graph"
        self.made += 1
        return self._tape.replay


@contextmanager
def _recording() -> Iterator[_Tapes]:
    yield _Tapes()


def _cut(micro_batch: MicroBatch, slots: int) -> MicroBatch:
    """Rows of the first slots, for another row length."""
    tokens, positions, masked, *others = micro_batch
    return tokens[:, :slots], positions[:, :slots], masked.clamp(max=slots - 1), *others


def _steps(make: Callable[[RankModel], None], changes: dict[str, Any]) -> list[list[Tensor]]:
    """Losses, evaluations and gradients of steps of several shapes and numbers of micro-batches."""
    config = small_config(**{**changes, "model": DROPOUT | changes.get("model", {})})
    topology = cpu_topology()
    model = small_model(config, topology)
    optimizer = build_optimizer(config, model)
    make(model)
    found, row = [], 100 * topology.data_parallel_rank
    for number, slots in ((2, 32), (3, 32), (2, 16), (2, 16), (3, 32)):
        batches = [_cut(packed_inputs(2, row + 2 * n), slots) for n in range(number)]
        row += 2 * number
        loss = model.runner.train(batches, torch.tensor(9.0))
        parameters = model.named_parameters().values()
        gradients = [p.grad.to_local().clone() for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters)
        optimizer.step(1e-2)
        found.append([loss, *model.runner.evaluate(batches[:1])[0], *gradients])
    return found


def _runs(model: RankModel) -> None:
    assert type(model.runner) is WholeModel


def _replays(model: RankModel) -> None:
    assert isinstance(model.runner, WholeModel)
    object.__setattr__(model, "runner", RecordedModel(model.runner.model, _recording))


def _check_same(changes: dict[str, Any], tolerance: float) -> None:
    for own, replayed in zip(_steps(_runs, changes), _steps(_replays, changes), strict=True):
        one, other = (torch.cat([x.flatten() for x in tensors]) for tensors in (own, replayed))
        # The table's gradient, which head and embeddings give, is summed in another order.
        assert (other - one).norm() < tolerance * one.norm()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-5),
        ({"precision": {"compute": "bf16"}}, 1e-5),
        ({"recompute": "full"}, 1e-5),
        ({"recompute": "selective"}, 1e-5),
        ({"model": {"architecture": "modernbert", "num_query_groups": 4}}, 1e-5),
        ({"precision": {"compute": "bf16", "fp8": "current"}}, 1e-5),
        ({"optimizer": {"name": "muon"}}, 1e-5),
        ({"precision": {"compute": "bf16", "reduce": "bf16"}}, 2e-2),
    ],
    ids=str,
)
def test_replayed_passes_give_what_passes_give_that_are_run(
    ranks: int, changes: dict[str, Any], tolerance: float
) -> None:
    run_ranks(ranks, _check_same, changes, tolerance)


def _check_single() -> None:
    """A step of one micro-batch, whose gradients are not rounded to BF16 where they are summed."""
    config = small_config(model=DROPOUT)
    found = []
    for make in (_runs, _replays):
        model = small_model(config, cpu_topology())
        make(model)
        for _ in range(2):  # the second adds to the first one's gradients
            loss = model.runner.train([packed_inputs(4)], torch.tensor(9.0))
        grads = [p.grad.to_local() for p in model.named_parameters().values()]  # type: ignore[union-attr]
        found.append([loss, *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-5)


def test_a_step_of_one_micro_batch_and_gradients_that_nobody_took() -> None:
    run_ranks(1, _check_single)


def _recordings() -> list[int]:
    model = small_model(small_config(), cpu_topology())
    assert isinstance(model.runner, WholeModel)
    recorders = []

    @contextmanager
    def recording() -> Iterator[_Tapes]:
        recorders.append(_Tapes())
        yield recorders[-1]

    runner = RecordedModel(model.runner.model, recording)
    for slots in (32, 32, 16, 16, 32):
        runner.train([_cut(packed_inputs(2), slots)] * 2, torch.tensor(9.0))
    return [recorder.made for recorder in recorders]


def test_a_pass_is_recorded_once_for_each_shape_in_turn() -> None:
    # What stands before the two blocks and each of them forward; head and second block, first
    # block, and what stands before it backward.
    assert run_ranks(1, _recordings) == [[5, 5, 5]]


class _Refusing(_Tapes):
    """A recorder whose first stretch ends in an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def end(self) -> Callable[[], None]:
        super().end()
        raise self._error


def _check_refused(error: Exception) -> tuple[str, list[str]]:
    """What is told of an error out of a recording; the step that failed leaves nothing behind."""
    model = small_model(small_config(), cpu_topology())
    assert isinstance(model.runner, WholeModel)
    refusing = RecordedModel(model.runner.model, lambda: nullcontext(_Refusing(error)))
    batches = [packed_inputs(2), packed_inputs(2, 2)]
    with pytest.raises((ConfigError, type(error))) as caught:
        refusing.train(batches, torch.tensor(9.0))
    told = caught.value
    assert told is error or told.__cause__ is error
    parameters = model.named_parameters().values()
    assert all(parameter.grad is None for parameter in parameters)
    launched = model.runner.train(batches, torch.tensor(9.0))
    assert torch.isfinite(launched)
    return f"{type(told).__name__}: {told}", list(getattr(told, "__notes__", ()))


def test_what_cannot_be_recorded_is_told_by_the_key_that_leaves_it_out() -> None:
    error = RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    ((told, notes),) = run_ranks(1, _check_refused, error)
    assert told == (
        "ConfigError: compile.cuda_graphs: passes cannot be recorded here (RuntimeError: "
        "operation not permitted when stream is capturing); use compile.cuda_graphs=false"
    )
    assert notes == []


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_memory_that_a_recording_lacks_is_told_as_that(kind: type[RuntimeError]) -> None:
    ((told, notes),) = run_ranks(1, _check_refused, kind("CUDA out of memory. Tried to allocate"))
    assert told == f"{kind.__name__}: CUDA out of memory. Tried to allocate"
    assert ["compile.cuda_graphs=false" in note for note in notes] == [True]


def test_a_rank_that_is_gone_is_told_as_that() -> None:
    ((told, _),) = run_ranks(1, _check_refused, dist.DistError("a rank is gone"))
    assert told == "DistError: a rank is gone"


def test_a_recording_waits_no_longer_for_other_ranks_than_a_step_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited = []

    class Never(HostPoint):
        def wait(self, timeout_seconds: float = 0.0, given_up: object = None) -> bool:
            waited.append(timeout_seconds)
            return False

    monkeypatch.setattr(recorded_passes, "work_point", lambda _: Never())
    recorder = recorded_passes._GraphRecorder(torch.device("cuda", 0), 7.0)
    with pytest.raises(DeviceStalledError, match="within 7 s"):
        recorder.begin()
    assert waited == [7.0]


class _Order(TorchDispatchMode):
    """What is begun, in order: products, gatherings and reductions."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, letter in (("::mm", "p"), ("::_allgather", "g"), ("::_reduce_scatter", "r")):
            if name in func.name():
                self.letters += letter
        return func(*args, **(kwargs or {}))


def _check_order() -> None:
    model = small_model(small_config(), cpu_topology())
    _replays(model)
    batches = [packed_inputs(2), packed_inputs(2, 2)]
    model.runner.train(batches, torch.tensor(9.0))
    with _Order() as order:
        model.runner.train(batches, torch.tensor(9.0))
    # Around the blocks and the first, and beside that the second; nothing between the passes; the
    # second block's gradients beside the first one's backward pass, the first one's and the rest.
    assert re.fullmatch("gggp+rp+rr", order.letters), order.letters


def test_replayed_passes_have_messages_beside_them() -> None:
    run_ranks(2, _check_order)


def _refusal() -> str:
    with pytest.raises(ConfigError) as caught:
        small_model(small_config(compile={"cuda_graphs": True}), cpu_topology())
    return str(caught.value)


def test_without_cuda_there_are_no_graphs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    assert "use compile.cuda_graphs=false" in run_ranks(1, _refusal)[0]


def _runner_on_a_gpu(key: dict[str, Any]) -> str:
    """What takes micro-batches where the device is CUDA as far as anyone can see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "facts_of", lambda _: ComputeDevice("cuda"))
        config = small_config(kernels="torch", **key)
        topology = replace(cpu_topology(), device=torch.device("cuda"))
        runner = build._one_rank_runner(None, config, topology)  # type: ignore[arg-type]
    return type(runner).__name__


@pytest.mark.parametrize(
    ("key", "runner"),
    [
        ({}, "RecordedModel"),
        ({"compile": {"cuda_graphs": True}}, "RecordedModel"),
        ({"compile": {"cuda_graphs": False}}, "WholeModel"),
        ({"parallel": {"reshard_after_forward": True}}, "WholeModel"),
    ],
)
def test_on_cuda_passes_are_recorded_wherever_they_can_be(key: dict[str, Any], runner: str) -> None:
    assert run_ranks(1, _runner_on_a_gpu, key) == [runner]


def _evaluated_without_memory() -> list[str]:
    model = small_model(small_config(), cpu_topology())
    assert isinstance(model.runner, WholeModel)
    recorded = RecordedModel(model.runner.model, lambda: nullcontext(_Tapes()))

    def lacks(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model.runner.model.units[0].register_forward_pre_hook(lacks)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        recorded.evaluate([packed_inputs(2)])
    return list(caught.value.__notes__)


def test_memory_that_an_evaluation_lacks_beside_recordings_is_told_so() -> None:
    ((note,),) = run_ranks(1, _evaluated_without_memory)
    assert "compile.cuda_graphs=false takes less" in note
