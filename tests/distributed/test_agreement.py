from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_bert.distributed.agreement import Ranks, RanksFailedError
from megatron_bert.errors import DataError, UserError
from tests.distributed_harness import run_ranks


def _rank_or_error(bad_rank: int, error: Exception) -> int:
    if dist.get_rank() == bad_rank:
        raise error
    return dist.get_rank()


def _failure_on_all(bad_rank: int, error: Exception) -> tuple[bool, str]:
    with pytest.raises(RanksFailedError) as caught:
        Ranks().on_all(lambda: _rank_or_error(bad_rank, error))
    return isinstance(caught.value, UserError), str(caught.value)


def _failure_on_first(error: Exception) -> tuple[bool, str]:
    with pytest.raises(RanksFailedError) as caught:
        Ranks().on_first(lambda: _rank_or_error(0, error))
    return isinstance(caught.value, UserError), str(caught.value)


def _results() -> tuple[list[int], int]:
    ranks = Ranks()
    return ranks.on_all(lambda: ranks.rank), ranks.on_first(lambda: ranks.size)


def test_results_reach_every_rank() -> None:
    assert run_ranks(3, _results) == [([0, 1, 2], 3)] * 3


def test_one_process_without_a_group_works_alone() -> None:
    assert Ranks().on_all(lambda: 7) == [7]
    assert Ranks().on_first(lambda: 8) == 8


def test_one_ranks_users_error_is_a_users_error_on_all() -> None:
    error = DataError("corpus.bin is cut short")
    assert run_ranks(2, _failure_on_all, 1, error) == [(True, "corpus.bin is cut short")] * 2
    assert run_ranks(2, _failure_on_first, error) == [(True, "corpus.bin is cut short")] * 2


def test_one_ranks_defect_is_named_with_its_rank_on_all() -> None:
    expected = [(False, "rank 1: ZeroDivisionError: by zero")] * 2
    assert run_ranks(2, _failure_on_all, 1, ZeroDivisionError("by zero")) == expected
