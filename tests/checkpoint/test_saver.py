"""Saves in the background, and what becomes of saves that fail."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_bert.checkpoint import shards as shards_module
from megatron_bert.checkpoint.manifest import JSON
from megatron_bert.checkpoint.save_result import SaveResult
from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.checkpoint.shards import HostCopy, LocalShards
from megatron_bert.checkpoint.store import CheckpointDefectError, CheckpointStore
from megatron_bert.distributed.launch import new_host_group
from megatron_bert.errors import CheckpointError
from tests.checkpoint.host_calls import HostCall, before_host_calls, disk_full_at
from tests.checkpoint.sharded_state import assert_same_bits, blank, sharded, whole_state
from tests.distributed_harness import PEER_GONE, RankError, run_ranks

MODES = pytest.mark.parametrize("in_background", [False, True], ids=["waited-for", "in-background"])
SECONDS = 120.0  # for what comes at once if it comes at all


def _saver(root: Path, *, in_background: bool = True, max_failures: int = 3) -> CheckpointSaver:
    group = new_host_group(SECONDS) if dist.is_initialized() else None
    store = CheckpointStore(root, keep=9, group=group)
    return CheckpointSaver(store, in_background=in_background, max_failures=max_failures)


@MODES
def test_a_save_is_told_with_its_size_and_how_long_the_caller_stood_still(
    tmp_path: Path, in_background: bool
) -> None:
    told: list[SaveResult] = []
    saver = CheckpointSaver(
        CheckpointStore(tmp_path, keep=1),
        in_background=in_background,
        max_failures=9,
        on_result=told.append,
    )
    began = time.perf_counter()
    saver.save(1, _tensors(), {"step": 1})
    stood_still = time.perf_counter() - began
    saver.finish()
    with before_host_calls(disk_full_at("write", "shard-*")):
        saver.save(2, _tensors(), {"step": 2})
        saver.finish()
    saver.save(3, _tensors(), {"step": 3}, is_last=True)
    first, failed, last = told
    assert 0 < first.blocked_seconds <= stood_still
    files = (tmp_path / "step_00000003").glob("*.safetensors")
    assert first.size == last.size == sum(path.stat().st_size for path in files)
    assert failed.step == 2
    assert "No space left" in str(failed.error)
    for waited_for in (last,) if in_background else (first, last):
        assert waited_for.blocked_seconds >= waited_for.seconds > 0


def _tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((6,), value)}


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@contextmanager
def _held(
    name: str, pattern: str, go_on: threading.Event | None = None
) -> Iterator[threading.Event]:
    """Hold the first such call of the writing thread until `go_on`, or until the block's end.

    Yields the event that is set when the call is held.
    """
    held, at_end = threading.Event(), threading.Event()
    go_on = go_on or at_end

    def hold(call: HostCall) -> None:
        if call.name == name and call.path.match(pattern) and not held.is_set():
            held.set()
            assert go_on.wait(SECONDS)

    with before_host_calls(hold):
        try:
            yield held
        finally:
            at_end.set()


def _change_weights_in_mid_save(root: Path, tensor_parallel: int) -> None:
    saver = _saver(root)
    tensors = sharded(whole_state(1), tensor_parallel)
    with _held("open", "shard-*") as held:
        saver.save(1, tensors, {"step": 1})
        assert held.wait(SECONDS)
        for name, tensor in sharded(whole_state(2), tensor_parallel).items():
            tensors[name].copy_(tensor)
    saver.finish()
    loaded = sharded(blank(whole_state()), tensor_parallel)
    store = CheckpointStore(root, keep=9)
    store.load(root / "step_00000001", loaded)
    assert_same_bits(loaded, whole_state(1))
    # The memory of the first copy serves the second.
    saver.save(2, tensors, {"step": 2})
    saver.finish()
    store.load(root / "step_00000002", loaded)
    assert_same_bits(loaded, whole_state(2))


@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(1, 1), (2, 1), (4, 2)])
def test_weights_changed_after_a_background_save_do_not_appear_in_the_file(
    tmp_path: Path, world_size: int, tensor_parallel: int
) -> None:
    run_ranks(world_size, _change_weights_in_mid_save, tmp_path, tensor_parallel)


def _talk_beside_a_save(root: Path) -> None:
    saver = _saver(root)
    tensors = sharded(whole_state(), 1)
    for step in range(1, 6):
        saver.save(step, tensors, {"step": step})
        # Messages of the training's kind, in the default group, as many as the save allows.
        for number in range(50):
            counts = torch.tensor([dist.get_rank(), number])
            dist.all_reduce(counts)
            assert counts.tolist() == [1, 2 * number]
            objects: list[object] = [None, None]
            dist.all_gather_object(objects, (dist.get_rank(), number))
            assert objects == [(0, number), (1, number)]
    saver.save(6, tensors, {"step": 6}, is_last=True)
    loaded = sharded(blank(whole_state()), 1)
    store = CheckpointStore(root, keep=9)
    for step in range(1, 7):
        assert store.load(root / f"step_{step:08d}", loaded) == {"step": step}
        assert_same_bits(loaded, whole_state())


def test_messages_of_a_background_save_never_meet_those_of_training(tmp_path: Path) -> None:
    run_ranks(2, _talk_beside_a_save, tmp_path)


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = _saver(tmp_path)
    waits, wait = threading.Event(), saver._wait

    def wait_and_tell() -> None:
        waits.set()
        wait()

    with _held("fsync", "manifest.json", go_on=waits) as held:
        saver.save(1, _tensors(1), {})
        assert held.wait(SECONDS)
        assert not (tmp_path / "step_00000001").exists(), "the caller was made to wait"
        monkeypatch.setattr(saver, "_wait", wait_and_tell)
        saver.save(2, _tensors(2), {})
        assert (tmp_path / "step_00000001").exists()
        saver.finish()
    assert _names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_the_last_save_is_waited_for_and_so_is_the_one_before(tmp_path: Path) -> None:
    saver = _saver(tmp_path)
    saver.save(1, _tensors(1), {})
    saver.save(2, _tensors(2), {}, is_last=True)
    assert _names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def _save_with_failures(
    root: Path, in_background: bool, bad_rank: int, good: list[int], steps: int
) -> tuple[list[str], str | None]:
    """Save `steps` times, of which only `good` find room; return the log and the error."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_bert").addHandler(handler)
    saver = _saver(root, in_background=in_background)
    full = disk_full_at("write", "*/shard-*")

    def refuse(call: HostCall) -> None:
        if dist.get_rank() == bad_rank and not any(
            f"{step:08d}." in str(call.path) for step in good
        ):
            full(call)

    with before_host_calls(refuse):
        try:
            for step in range(1, steps + 1):
                saver.save(step, sharded(whole_state(), 1), {})
            saver.finish()
        except CheckpointError as error:
            return messages, f"before step {step}: {error}"
        finally:
            logging.getLogger("megatron_bert").removeHandler(handler)
    return messages, None


@MODES
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_failed_saves_are_told_by_all_ranks_and_end_the_run_only_when_too_many_in_a_row(
    tmp_path: Path, in_background: bool, bad_rank: int
) -> None:
    results = run_ranks(2, _save_with_failures, tmp_path, in_background, bad_rank, [3, 6], 20)
    (messages, error), (others, other_error) = results
    assert error is not None
    assert error == other_error
    # In the background a failure is noticed when the next save begins.
    assert error.startswith(f"before step {10 if in_background else 9}: cannot save ")
    assert f"step_00000009: rank {bad_rank}: [Errno 28] No space left" in error
    assert error.endswith("3 saves in a row failed (checkpoint.max_failures=3)")
    assert others == [], "the first rank speaks for all"
    told = [(message.split(" was not saved")[0], message.split("; ")[-1]) for message in messages]
    limit = "(checkpoint.max_failures=3)"
    counts = ["1 save failed", "2 saves in a row failed", "3 saves in a row failed"]
    expected = zip([1, 2, 4, 5, 7, 8, 9], [0, 1, 0, 1, 0, 1, 2], strict=True)
    assert told == [(f"step {step}", f"{counts[count]} {limit}") for step, count in expected]
    assert _names(tmp_path) == ["latest", "step_00000003", "step_00000006"]


@MODES
def test_fewer_failures_than_the_limit_end_nothing(tmp_path: Path, in_background: bool) -> None:
    for messages, error in run_ranks(2, _save_with_failures, tmp_path, in_background, 0, [1], 3):
        assert error is None
        assert len(messages) in (0, 2)


@MODES
def test_the_last_save_of_a_job_must_succeed(tmp_path: Path, in_background: bool) -> None:
    saver = _saver(tmp_path, in_background=in_background)
    saver.save(1, _tensors(), {})
    saver.finish()
    with (
        before_host_calls(disk_full_at("fsync", "shard-*")),
        pytest.raises(CheckpointError, match=r"cannot save .*step_00000002.*make room"),
    ):
        saver.save(2, _tensors(), {}, is_last=True)
    assert _names(tmp_path) == ["latest", "step_00000001"]


def test_the_last_save_is_tried_also_after_too_many_failures(tmp_path: Path) -> None:
    saver = _saver(tmp_path, max_failures=1)
    with before_host_calls(disk_full_at("write", "step_00000001.*/shard-*")):
        saver.save(1, _tensors(), {})
        saver.save(2, _tensors(), {}, is_last=True)
    assert _names(tmp_path) == ["latest", "step_00000002"]


def test_finishing_tells_of_one_failure_too_many(tmp_path: Path) -> None:
    saver = _saver(tmp_path, max_failures=1)
    with before_host_calls(disk_full_at("write", "shard-*")):
        saver.save(1, _tensors(), {})
        with pytest.raises(CheckpointError, match=r"1 save failed \(checkpoint.max_failures=1\)"):
            saver.finish()


@MODES
def test_a_defect_counts_as_a_failure_and_is_told_from_what_a_user_can_mend(
    tmp_path: Path, in_background: bool
) -> None:
    saver = _saver(tmp_path, in_background=in_background, max_failures=1)
    no_json: dict[str, JSON] = {"bad": {1, 2}}  # type: ignore[dict-item]
    if in_background:
        saver.save(1, _tensors(), no_json)
    with pytest.raises(CheckpointDefectError, match=r"not JSON serializable.*max_failures=1"):
        saver.save(2, _tensors(), no_json)
    assert _names(tmp_path) == []


def _abandon(root: Path) -> None:
    saver = _saver(root)
    saver.save(1, sharded(whole_state(), 1), {})
    saver.finish()
    with _held("write", "shard-*", go_on=saver._abandoned) as held:
        saver.save(2, sharded(whole_state(), 1), {})
        assert held.wait(SECONDS)
        saver.close()
    # All ranks gave up, and so rank 0 could clean up.
    assert _names(root) == ["latest", "step_00000001"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_in_flight_is_abandoned_when_the_run_ends(tmp_path: Path, world_size: int) -> None:
    run_ranks(world_size, _abandon, tmp_path, deadline_seconds=SECONDS)


def _abandon_alone(root: Path) -> str | None:
    """One rank fails in training; the other, which goes on, learns that the save was given up."""
    saver = _saver(root, max_failures=1)
    tensors = sharded(whole_state(), 1)
    with _held("write", "shard-00002-*", go_on=saver._abandoned) as held:
        saver.save(1, tensors, {})
        if dist.get_rank() == 1:
            assert held.wait(SECONDS)
            saver.close()
            return None
        with pytest.raises(CheckpointError) as caught:
            saver.save(2, tensors, {})
    return str(caught.value)


def test_what_one_rank_abandons_is_a_failure_on_the_others(tmp_path: Path) -> None:
    message = run_ranks(2, _abandon_alone, tmp_path, deadline_seconds=SECONDS)[0]
    assert "rank 1: given up, because the run ends" in message


def _lose_a_peer(root: Path, end: Callable[[HostCall], None]) -> None:
    saver = _saver(root)
    if dist.get_rank() == 1:
        with before_host_calls(end):
            saver.save(1, sharded(whole_state(), 1), {})
            saver.finish()
    else:
        saver.save(1, sharded(whole_state(), 1), {})
        saver.finish()


def _die(_call: HostCall) -> None:
    os._exit(9)


def test_a_peer_that_dies_in_mid_save_ends_the_wait_for_it(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=rf"exit code 9|{PEER_GONE}") as caught:
        run_ranks(2, _lose_a_peer, tmp_path, _die, deadline_seconds=SECONDS)
    assert "no answer within" not in str(caught.value)


def test_a_copy_keeps_its_memory_and_its_places(tmp_path: Path) -> None:
    copy = HostCopy()
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 3, dtype=torch.float64).T,
        "none": torch.zeros(0, 2),
        "scalar": torch.tensor(2.0),
    }
    addresses = []
    for _ in range(2):
        copy.reserve(LocalShards.of(tensors))
        taken = copy.take(LocalShards.of(tensors))
        copy.wait(threading.Event())
        for name, tensor in tensors.items():
            assert torch.equal(taken.pieces[name], tensor)
            assert taken.pieces[name].data_ptr() != tensor.data_ptr() or not tensor.numel()
        addresses.append([piece.data_ptr() for piece in taken.pieces.values()])
        tensors["b"].mul_(2)
    assert addresses[0] == addresses[1]


def test_memory_that_could_not_be_pinned_is_not_taken_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusals = iter([True, False])

    def pin(_: torch.Tensor) -> None:
        if next(refusals):
            raise CheckpointError("cannot pin 64 bytes")

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(shards_module, "_pin", pin)
    copy, shards = HostCopy(), LocalShards.of({"a": torch.ones(3)})
    shards.pieces["a"] = shards.pieces["a"].as_subclass(OnCuda)  # type: ignore[index]
    with pytest.raises(CheckpointError, match="cannot pin"):
        copy.reserve(shards)
    copy.reserve(shards)
    assert next(refusals, None) is None, "was not pinned"


def _save_where_one_rank_has_no_memory(root: Path) -> list[str]:
    saver = CheckpointSaver(
        CheckpointStore(root, keep=2, group=new_host_group(SECONDS)),
        in_background=True,
        max_failures=2,
    )
    problems = []
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(HostCopy, "reserve", _no_memory)
        for step in (1, 2):
            try:
                saver.save(step, {"weight": torch.ones(4)}, {})
            except CheckpointError as error:
                problems.append(str(error))
    saver.save(3, {"weight": torch.ones(4)}, {}, is_last=True)
    return problems


def _no_memory(_copy: HostCopy, _shards: LocalShards) -> None:
    raise CheckpointError("cannot pin 64 bytes")


def test_a_rank_without_memory_for_a_copy_fails_the_save_on_all(tmp_path: Path) -> None:
    for problems in run_ranks(2, _save_where_one_rank_has_no_memory, tmp_path):
        (problem,) = problems
        assert "cannot pin 64 bytes" in problem
        assert "2 saves in a row" in problem
    assert CheckpointStore(tmp_path, keep=2).newest() == tmp_path / "step_00000003"


@MODES
def test_a_save_is_measured_once_it_has_succeeded(tmp_path: Path, in_background: bool) -> None:
    saver = _saver(tmp_path, in_background=in_background)
    assert saver.seconds is None
    with before_host_calls(disk_full_at("write", "shard-*")):
        saver.save(1, _tensors(), {})
        saver.finish()
    assert saver.seconds is None
    assert saver.saved_step is None
    saver.save(2, _tensors(), {})
    saver.finish()
    assert saver.seconds is not None
    assert saver.seconds > 0.0
    assert saver.saved_step == 2
    assert not saver.is_saving
