from __future__ import annotations

import re
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bert.training.roll_call import RollCall
from tests.distributed_harness import run_ranks

SECONDS = 30.0


def _wait_in_vain() -> BaseException:
    """Wait for a message that another rank never sends, in a group whose failure hurts no other."""
    group = dist.new_group(timeout=timedelta(seconds=0.5))
    ranks = dist.get_world_size()
    if dist.get_rank() == ranks - 1:
        return TimeoutError("not in the message")
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return error
    raise AssertionError("the message passed")


def _meet(name: str) -> None:
    """Let all ranks come to the same point by way of the store."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{name} {dist.get_rank()}", "")
    keys = [f"{name} {rank}" for rank in range(dist.get_world_size())]
    store.wait(keys, timedelta(seconds=SECONDS))


def _call_with_a_silent_rank() -> str | None:
    # The last rank's thread is not there, as if its process were stopped.
    last = dist.get_rank() == dist.get_world_size() - 1
    roll_call = RollCall(answer_within_seconds=3.0)
    if last:
        roll_call.close()
    _meet("silent")
    error = _wait_in_vain()
    reason = None if last else str(roll_call.explain(error))
    _meet("done")
    roll_call.close()
    return reason


def test_a_rank_that_does_not_answer_is_named_by_the_others() -> None:
    *named, silent = run_ranks(3, _call_with_a_silent_rank)
    assert silent is None
    for reason in named:
        assert re.match(r"rank 2 \(host \S+, process \d+\) stopped answering, or died", reason)


def _call_with_all_alive() -> str | None:
    roll_call = RollCall(answer_within_seconds=20.0)
    error = _wait_in_vain()
    last = dist.get_rank() == dist.get_world_size() - 1
    began = time.monotonic()
    reason = None if last else str(roll_call.explain(error))
    assert time.monotonic() - began < 19.0, "all had answered"
    _meet("done")
    roll_call.close()
    return reason


def test_where_all_ranks_answer_it_is_said_what_each_is_at() -> None:
    reason, nothing = run_ranks(2, _call_with_all_alive)
    assert nothing is None
    assert "all ranks are alive" in reason
    assert "rank 1 at outside of megatron_bert" in reason
    assert "rank 0 at training/roll_call.py" in reason


def _fail_on_the_last() -> tuple[str, str]:
    roll_call = RollCall(answer_within_seconds=20.0)
    error = _wait_in_vain()
    if dist.get_rank() == dist.get_world_size() - 1:
        error = ValueError("row 7 is bad")
        reason = roll_call.explain(error)
        assert reason is error
        _meet("failed")
    else:
        _meet("failed")
        reason = roll_call.explain(error)
    roll_call.close()
    return type(reason).__name__, str(reason)


def test_the_rank_that_failed_is_named_with_its_error() -> None:
    (kind, text), own = run_ranks(2, _fail_on_the_last)
    assert own == ("ValueError", "row 7 is bad")
    assert kind == "PeersLostError"
    assert re.match(r"rank 1 \(host .*\) failed: ValueError: row 7 is bad", text)


def _alone() -> bool:
    roll_call = RollCall()
    error = ValueError("bad")
    roll_call.close()
    return roll_call.explain(error) is error


def test_a_single_rank_has_nobody_to_call() -> None:
    assert run_ranks(1, _alone) == [True]
