"""Finds out which ranks are gone when messages between them fail.

A rank that waits in vain for a message only knows that it did not arrive. But the ranks still share
the store through which they found each other (under torchrun, the launcher's): a rank that fails
calls the roll there, and every live rank answers from a thread of its own, whatever else it is
waiting for. A stopped process has no running thread to answer.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

import megatron_bert
from megatron_bert.command_line.run import EXIT_USER_ERROR
from megatron_bert.errors import RunError, UserError
from megatron_bert.words import numbered

# How often a rank checks whether it was called, and how long all ranks together have to answer.
_LOOK_SECONDS = 0.5
ANSWER_WITHIN_SECONDS = 5.0
_CALLED = "called"
# Keys for the rank that failed by itself and, set before it, for its error's text.
_FAILED, _FAILURE = "failed", "failure"

_PACKAGE = Path(megatron_bert.__file__).parent


class PeersLostError(RunError):
    """Messages between ranks failed; the text names the ranks that are gone.

    Its notes hold what the messages' own errors say.
    """


class RollCall:
    """Reports this rank's failure to the default process group, and answers when a rank asks.

    Args:
        answer_within_seconds: how long ranks have to answer.
    """

    def __init__(self, answer_within_seconds: float = ANSWER_WITHIN_SECONDS) -> None:
        self._answer_within = answer_within_seconds
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        if self._size == 1:
            return
        self._main_thread = threading.get_ident()
        # A separate connection, so that the thread never blocks on what the main thread waits for.
        store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(_unused_prefix(), store)  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=answer_within_seconds))
        own = {"host": socket.gethostname(), "process": os.getpid()}
        self._store.set(_name(self._rank), json.dumps(own))
        self._start("roll-call", self._listen)

    def __enter__(self) -> RollCall:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        # A thread may still be blocked on a store that does not answer: if the store came back or
        # ended while the interpreter shuts down, the thread would abort it, with another exit code.
        # And a CUDA device may be waiting for a rank that is gone: the interpreter would wait too.
        could_not_end = any(thread.is_alive() for thread in self._threads) or (
            isinstance(error, PeersLostError) and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        )
        if error is not None and could_not_end:
            atexit.register(_leave, EXIT_USER_ERROR if isinstance(error, UserError) else 1)

    def close(self) -> None:
        """Stop answering, because this rank ends."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self._answer_within)

    def explain(self, error: BaseException) -> BaseException:
        """Return the error to report for this rank's error.

        An error of this rank's own is returned unchanged, and the other ranks are told of it. If a
        message between ranks failed, the result names the ranks that are gone; finding them takes
        at most a second more than `answer_within_seconds`. Nothing is raised, whatever fails
        meanwhile.
        """
        if self._size == 1:
            return error
        explained: list[BaseException] = []
        # The store of a stopped process never answers, whatever its timeout.
        try:
            asking = self._start("asking", lambda: explained.append(self._explain(error)))
        except RuntimeError as problem:
            return _store_lost(error, _first_line(problem))
        asking.join(self._answer_within + 1.0)
        return explained[0] if explained else _store_lost(error, "no answer")

    def _start(self, name: str, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def _explain(self, error: BaseException) -> BaseException:
        try:
            if not _is_of_messages(error):
                text = f"{type(error).__name__}: {error}"
                # A file name may contain characters that UTF-8 cannot encode.
                self._store.set(_FAILURE, text.encode("utf-8", "backslashreplace").decode())
                self._store.set(_FAILED, str(self._rank))
                return error
            return _peers_lost(self._find_reason(), error)
        except Exception as problem:
            # From the store: the process that holds it is gone.
            return _store_lost(error, _first_line(problem))

    def _listen(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            with suppress(RuntimeError):  # from the store: nobody is left to answer
                if self._store.check([_CALLED]):
                    self._store.set(_answer(self._rank), _place_of(self._main_thread))
                    return

    def _find_reason(self) -> str:
        """Ask all ranks; each look takes two requests to the store, for any number of ranks."""
        self._store.set(_CALLED, "")
        deadline = time.monotonic() + self._answer_within
        answers = [_answer(rank) for rank in range(self._size)]
        is_last_look = False
        while not self._store.check(answers):
            if self._store.check([_FAILED]):
                rank = int(self._store.get(_FAILED))
                return f"{self._describe(rank)} failed: {self._store.get(_FAILURE).decode()}"
            if is_last_look:
                break
            time.sleep(_LOOK_SECONDS / 5)
            is_last_look = time.monotonic() >= deadline
        silent = [rank for rank in range(self._size) if not self._store.check([answers[rank]])]
        if silent:
            who = ", ".join(map(self._describe, silent))
            return (
                f"{who} stopped answering, or died: look at that host and its log, and resume from "
                "the last checkpoint"
            )
        return (
            "a message between ranks did not pass, but all ranks are alive: look at the network, "
            f"or at a rank that is elsewhere than the others: {_by_place(self._places())}"
        )

    def _places(self) -> dict[int, str]:
        """Where in the code each rank is; all of them must have answered."""
        return {rank: self._store.get(_answer(rank)).decode() for rank in range(self._size)}

    def _describe(self, rank: int) -> str:
        if not self._store.check([_name(rank)]):
            return f"rank {rank}"
        name = json.loads(self._store.get(_name(rank)))
        return f"rank {rank} (host {name['host']}, process {name['process']})"


def _unused_prefix() -> str:
    """Agree on a prefix of the store that nobody has used yet.

    Under torchrun the store outlives the ranks: after a restart (`--max-restarts`), it still holds
    what the earlier ranks said.
    """
    token = torch.tensor(secrets.randbits(62))
    dist.broadcast(token, src=0)
    return f"roll-call/{token.item()}"


def _leave(code: int) -> None:
    """End the process without shutting down the interpreter."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(code)


def _store_lost(error: BaseException, problem: str) -> BaseException:
    if not _is_of_messages(error):
        return error
    lost = _peers_lost(
        "messages between ranks failed, and so did asking for the ranks that are gone: rank 0 or "
        "the launcher, where they meet, may be gone; resume from the last checkpoint",
        error,
    )
    lost.add_note(f"the answer to asking: {problem}")
    return lost


def _peers_lost(reason: str, error: BaseException) -> PeersLostError:
    lost = PeersLostError(reason)
    lost.add_note(f"the message that failed here: {_first_line(error)}")
    return lost


def _name(rank: int) -> str:
    return f"name of {rank}"


def _answer(rank: int) -> str:
    return f"answer of {rank}"


def _is_of_messages(error: BaseException) -> bool:
    """Whether the error, or one of its causes, is a message between ranks that failed."""
    cause: BaseException | None = error
    while cause is not None:
        # Gloo's errors have no type of their own; they begin with the source file.
        if isinstance(cause, dist.DistError) or (
            isinstance(cause, RuntimeError) and "/gloo/" in str(cause)
        ):
            return True
        cause = cause.__cause__
    return False


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _place_of(thread: int) -> str:
    """The innermost line of this package that a thread is executing."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "outside of megatron_bert"


def _by_place(places: Mapping[int, str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, place in places.items():
        ranks.setdefault(place, []).append(rank)
    return "; ".join(f"{numbered('rank', its)} at {place}" for place, its in ranks.items())
