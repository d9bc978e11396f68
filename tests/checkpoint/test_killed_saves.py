"""A save that is killed instead of any call that it makes to the host leaves a whole checkpoint."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.distributed.launch import new_host_group
from tests.checkpoint.host_calls import before_host_calls, dies_at
from tests.checkpoint.sharded_state import assert_same_bits, blank, sharded, whole_state
from tests.distributed_harness import PEER_GONE, RankError, run_ranks


def _save(root: Path, step: int, in_background: bool) -> None:
    store = CheckpointStore(root, keep=1, group=new_host_group(30.0))
    saver = CheckpointSaver(store, in_background=in_background, max_failures=1)
    saver.save(step, sharded(whole_state(step), 1), {"step": step})
    saver.finish()


def _save_and_die(root: Path, rank: int, call: int, in_background: bool) -> None:
    if dist.get_rank() == rank:
        with before_host_calls(dies_at(call)):
            _save(root, 2, in_background)
    else:
        _save(root, 2, in_background)


def _dies(root: Path, world_size: int, rank: int, call: int, in_background: bool) -> bool:
    try:
        run_ranks(world_size, _save_and_die, root, rank, call, in_background)
    except RankError as error:
        # The others may be heard first.
        if re.search(rf"exit code 9|{PEER_GONE}", str(error)) is None:
            raise
        return True
    return False


def _check_every_call(folder: Path, world_size: int, rank: int, in_background: bool) -> int:
    """Kill `rank` in one save after another, a call later each time; return how many calls."""
    for call in itertools.count():
        root = folder / str(call)
        run_ranks(1, _save, root, 1, False)
        died = _dies(root, world_size, rank, call, in_background)
        store = CheckpointStore(root, keep=1)
        path = store.newest()
        assert path is not None
        loaded = blank(whole_state())
        step = store.load(path, loaded)["step"]
        assert step in (1, 2)
        assert isinstance(step, int)
        assert_same_bits(loaded, whole_state(step))
        store.save(3, {"weight": torch.zeros(2)}, {})
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000003"]
        if not died:
            assert step == 2
            return call
    raise AssertionError("unreachable")


@pytest.mark.parametrize("in_background", [False, True], ids=["waited-for", "in-background"])
def test_killed_at_any_call_of_a_save_a_whole_checkpoint_is_left(
    tmp_path: Path, in_background: bool
) -> None:
    assert _check_every_call(tmp_path, 1, 0, in_background) > 20


@pytest.mark.faults
@pytest.mark.parametrize("in_background", [False, True], ids=["waited-for", "in-background"])
@pytest.mark.parametrize(("rank", "calls"), [(0, 20), (1, 3)])
def test_one_rank_of_two_killed_at_any_call_leaves_a_whole_checkpoint(
    tmp_path: Path, rank: int, calls: int, in_background: bool
) -> None:
    assert _check_every_call(tmp_path, 2, rank, in_background) >= calls
