"""A run's saves, one after another, in the background or not, and the handling of failures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait

import torch

from megatron_bert.checkpoint.manifest import JSON
from megatron_bert.checkpoint.save_result import SaveResult
from megatron_bert.checkpoint.shards import HostCopy, LocalShards
from megatron_bert.checkpoint.store import CheckpointDefectError, CheckpointStore
from megatron_bert.distributed.agreement import RanksFailedError
from megatron_bert.errors import CheckpointError

# A thread that is between two writes ends at once; one that waits for the disk or for a rank that
# is gone is left behind.
_ABANDON_SECONDS = 10.0

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves checkpoints one at a time, and tolerates a number of failures in a row.

    All methods must be called by all ranks together. A save in the background works on a copy of
    the state in the host's memory, and uses the store's process group only: give the store a group
    of its own, so that its messages never mix with those of the training loop.

    Args:
        store: Where checkpoints go.
        in_background: Whether to write in a thread, while the caller goes on.
        max_failures: Failed saves in a row that end the run.
        on_result: Called with the result of every save, by the thread that writes it, except for a
            failed last one, which raises.

    Attributes:
        seconds: How long the last successful save took to write; None before the first one.
        saved_step: Its step.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        in_background: bool,
        max_failures: int,
        on_result: Callable[[SaveResult], None] | None = None,
    ) -> None:
        self._store = store
        self._host_copy = HostCopy() if in_background else None
        self._max_failures = max_failures
        self._on_result = on_result or (lambda _: None)
        self._failures: list[CheckpointError | CheckpointDefectError] = []  # in a row
        self._in_flight: Future[None] | None = None
        self._abandoned = threading.Event()
        self._stall = _Stall()
        self.seconds: float | None = None
        self.saved_step: int | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight."""
        return self._in_flight is not None and not self._in_flight.done()

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, JSON],
        *,
        is_last: bool = False,
    ) -> None:
        """Save a checkpoint, or begin to; the one before is finished first. Collective.

        The first rank logs the result. `tensors` may be changed as soon as this returns.

        Args:
            step: See `CheckpointStore.save`.
            tensors: See there.
            state: See there; it must not be changed afterwards.
            is_last: Whether nothing comes after it: it is then waited for, and must succeed.

        Raises:
            CheckpointError: `max_failures` saves in a row failed, or the last one did. A failure in
                the background is only noticed by the next call.
            CheckpointDefectError: The same, for a reason that no user can fix.
        """
        stall = _Stall()
        self._wait()
        # Only now, because a save in flight would still have needed its own.
        self._stall = stall
        if is_last:
            # Even after failures: this one may succeed.
            self._write(step, LocalShards.of(tensors), state)
            return
        self._raise_if_too_many()
        shards = LocalShards.of(tensors)
        if self._host_copy is None:
            self._attempt(step, shards, state)
            self._raise_if_too_many()
        else:
            self._begin(step, self._host_copy, shards, state)

    def finish(self) -> None:
        """Wait for the save in flight, if any. Collective.

        Raises:
            CheckpointError, CheckpointDefectError: It was one failure too many (see `save`).
        """
        self._wait()
        self._raise_if_too_many()

    def close(self) -> None:
        """Abandon the save in flight, if any, without waiting long; older checkpoints stay."""
        if self._in_flight is not None:
            self._abandoned.set()
            wait([self._in_flight], timeout=_ABANDON_SECONDS)

    def _wait(self) -> None:
        if self._in_flight is not None:
            self._in_flight.result()
            self._in_flight = None

    def _begin(
        self,
        step: int,
        host_copy: HostCopy,
        shards: LocalShards,
        state: Mapping[str, JSON],
    ) -> None:
        """Copy the shards and write the copy in the background, on all ranks or on none."""
        try:
            self._store.ranks.on_all(lambda: host_copy.reserve(shards))
        except RanksFailedError as error:
            self._note_failure(step, CheckpointError(f"no memory for a copy: {error}"))
            self._raise_if_too_many()
        else:
            self._in_flight = self._start(step, host_copy, shards, state)

    def _start(
        self,
        step: int,
        host_copy: HostCopy,
        shards: LocalShards,
        state: Mapping[str, JSON],
    ) -> Future[None]:
        done: Future[None] = Future()
        copied = host_copy.take(shards)

        def work() -> None:
            try:
                host_copy.wait(self._abandoned)
                self._check()
                # A CUDA device works in stream order: no later step begins there before the copy is
                # done.
                self._stall.end()
                self._attempt(step, copied, state)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        # A daemon, because a thread that waits for a dead rank must not keep the process from
        # ending.
        threading.Thread(target=work, name=f"save of step {step}", daemon=True).start()
        return done

    def _attempt(self, step: int, shards: LocalShards, state: Mapping[str, JSON]) -> None:
        """Save and count failures; an error that is not the same on all ranks is raised."""
        try:
            self._write(step, shards, state)
        except (CheckpointError, CheckpointDefectError) as error:
            # Its traceback would keep the shards alive.
            self._note_failure(step, error.with_traceback(None))
        else:
            self._failures = []

    def _note_failure(self, step: int, error: CheckpointError | CheckpointDefectError) -> None:
        self._failures.append(error)
        if self._store.ranks.rank == 0:
            logger.warning("step %s was not saved: %s; %s", f"{step:,}", error, self._count())
        self._on_result(SaveResult(step, error=str(error)))

    def _write(self, step: int, shards: LocalShards, state: Mapping[str, JSON]) -> None:
        began = time.perf_counter()
        saved = self._store.save_shards(step, shards, state, self._check)
        self.seconds, self.saved_step = time.perf_counter() - began, step
        if self._store.ranks.rank == 0:
            logger.info("step %s · saved %s in %.1f s", f"{step:,}", saved.path, self.seconds)
        self._on_result(SaveResult(step, self.seconds, self._stall.end(), saved.size))

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise CheckpointError("given up, because the run ends")

    def _raise_if_too_many(self) -> None:
        if len(self._failures) >= self._max_failures:
            last = self._failures[-1]
            raise type(last)(f"{last}; {self._count()}")

    def _count(self) -> str:
        """How many saves failed, in words."""
        failed = len(self._failures)
        saves = "1 save" if failed == 1 else f"{failed} saves in a row"
        return f"{saves} failed (checkpoint.max_failures={self._max_failures})"


class _Stall:
    """How long training stands still for a save: from now to the first `end`."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: float | None = None

    def end(self) -> float:
        if self._seconds is None:
            self._seconds = time.perf_counter() - self._began
        return self._seconds
