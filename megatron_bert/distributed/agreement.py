"""Work that succeeds on all ranks or fails on all of them.

A rank that raised while the others wait in a collective would leave them there until the process
group's timeout, so what a rank could not do travels to the others as a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_bert.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What one rank could not do."""

    rank: int
    text: str
    errno: int | None  # of an `OSError`, else None
    is_user_error: bool

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe `error`, which need not be picklable itself."""
        if isinstance(error, UserError):
            return cls(rank, str(error), None, True)
        if isinstance(error, OSError):
            return cls(rank, str(error), error.errno, False)
        return cls(rank, f"{type(error).__name__}: {error}", None, False)


class RanksFailedError(Exception):
    """Raised on every rank alike because of what failed on some of them."""

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__("; ".join(f"rank {failure.rank}: {failure.text}" for failure in failures))
        self.failures = failures


class RanksRefusedError(RanksFailedError, UserError):
    """All that failed, on some ranks, are errors that the user can fix; the message is theirs."""

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(failure.text for failure in self.failures))


@dataclass(frozen=True)
class _Success(Generic[T]):
    value: T


class Ranks:
    """The ranks of a process group, or this process alone where there is none.

    Args:
        group: The ranks that work together; None means the default group.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.is_distributed else 0
        self.size = dist.get_world_size(group) if self.is_distributed else 1

    def on_first(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank and return its result on all. Collective.

        Raises:
            RanksRefusedError: `work` raised a `UserError`.
            RanksFailedError: `work` raised another `Exception`.
        """
        own: list[_Success[T] | Failure | None] = [self._attempt(work) if self.rank == 0 else None]
        if self.is_distributed:
            dist.broadcast_object_list(own, group=self.group, group_src=0)
        return _values(own)[0]

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank and return all results in rank order on each. Collective.

        Raises:
            RanksRefusedError: `work` raised a `UserError` on at least one rank, and nothing else.
            RanksFailedError: `work` raised another `Exception` on at least one rank.
        """
        outcomes: list[_Success[T] | Failure | None] = [self._attempt(work)]
        if self.is_distributed:
            own = outcomes[0]
            outcomes = [None] * self.size
            dist.all_gather_object(outcomes, own, group=self.group)
        return _values(outcomes)

    def _attempt(self, work: Callable[[], T]) -> _Success[T] | Failure:
        try:
            return _Success(work())
        except Exception as error:
            return Failure.of(self.rank, error)


def _values(outcomes: list[_Success[T] | Failure | None]) -> list[T]:
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failures and all(failure.is_user_error for failure in failures):
        raise RanksRefusedError(failures)
    if failures:
        raise RanksFailedError(failures)
    return [outcome.value for outcome in outcomes if isinstance(outcome, _Success)]
