from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.distributed_harness import RankError, run_ranks


def _sum_over_ranks(offset: int) -> torch.Tensor:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return value


def _raise_on_rank(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        raise ValueError("a broken rank")
    dist.barrier()


def _hang_on_rank(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        signal.pause()


def _die_on_rank(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_every_rank_returns_its_result() -> None:
    assert [value.item() for value in run_ranks(3, _sum_over_ranks, 1)] == [6, 6, 6]


def test_a_raising_rank_ends_all_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: (?s:.*)ValueError: a broken rank"):
        run_ranks(2, _raise_on_rank, 1)


def test_a_dying_rank_ends_all_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="rank 0 of 2: died with exit code -9"):
        run_ranks(2, _die_on_rank, 0)


def test_a_hanging_rank_is_named_with_its_stack_at_the_deadline() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: no answer within 0.5 s(?s:.*)_hang_on_rank"):
        run_ranks(2, _hang_on_rank, 1, deadline_seconds=0.5)
