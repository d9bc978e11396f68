"""Run a function on several gloo ranks, fast and with a deadline.

Ranks are forked from a server process that has torch and the trainer imported already, so a test
costs what the ranks do and not what their imports take. The server is started by the first call and
inherits the environment of that moment: a later `monkeypatch.setenv` does not reach the ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.deadlines import DEADLINE_SECONDS

PRELOADED = [
    "pytest",
    "numpy",
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "safetensors.torch",
    "torch._dynamo",  # DTensor and fully_shard import it at their first use, in a second or more
    "megatron_bert.training.trainer",
    "tests.distributed_harness",
]
# What ranks hear of one that was killed; they may fail of it before its end is noticed.
PEER_GONE = r"Connection (?:closed|reset) by peer"
DUMP_SECONDS = 1.0  # what a hanging rank gets to write its stack down, and a finished one to leave


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds the tracebacks by rank."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, deadline_seconds: float = DEADLINE_SECONDS
) -> list[Any]:
    """Call `fn(*args)` on `world_size` gloo ranks and return the ranks' results in rank order.

    `fn` must be a module-level function; it, its arguments and its results are pickled (tensors by
    value). Inside, the default process group is initialised and `RANK`, `LOCAL_RANK` and
    `WORLD_SIZE` are set as torchrun sets them.

    Raises:
        RankError: A rank raised or died (its traceback or exit code is shown and the others are
            killed at once), or `deadline_seconds` passed (the stacks of the hanging ranks are
            shown).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = _Ranks(context, world_size, Path(folder), deadline_seconds)
        try:
            ranks.start(pickle.dumps((fn, args)))
            return ranks.results()
        finally:
            ranks.end()


class _Ranks:
    """The processes of one call."""

    def __init__(
        self, context: ForkServerContext, world_size: int, folder: Path, deadline_seconds: float
    ) -> None:
        self.context = context
        self.world_size = world_size
        self.folder = folder
        self.deadline_seconds = deadline_seconds
        self.processes: list[ForkServerProcess] = []
        self.connections: list[Connection] = []

    def start(self, call: bytes) -> None:
        for rank in range(self.world_size):
            receiver, sender = self.context.Pipe(duplex=False)
            process = self.context.Process(
                target=_run_rank,
                args=(rank, self.world_size, self.folder, call, sender, self.deadline_seconds),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            # The parent's copy must go, or a rank that dies never shows as the end of its pipe.
            sender.close()
            self.processes.append(process)
            self.connections.append(receiver)

    def results(self) -> list[Any]:
        deadline = time.monotonic() + self.deadline_seconds + DUMP_SECONDS
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        open_ranks = {connection: rank for rank, connection in enumerate(self.connections)}
        while open_ranks and not failures:
            ready = wait(list(open_ranks), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures = {rank: self._stack_of(rank) for rank in open_ranks.values()}
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = open_ranks.pop(connection)
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self.processes[rank].join(DUMP_SECONDS)
                    ok, value = False, self._end_of(rank)
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
        if failures:
            raise RankError(
                "\n".join(
                    f"rank {rank} of {self.world_size}: {text}"
                    for rank, text in sorted(failures.items())
                )
            )
        return [results[rank] for rank in range(self.world_size)]

    def _stack_of(self, rank: int) -> str:
        return f"no answer within {self.deadline_seconds:g} s\n{self._written_by(rank)}"

    def _end_of(self, rank: int) -> str:
        text = f"died with exit code {self.processes[rank].exitcode}"
        return f"{text}\n{self._written_by(rank)}".rstrip()

    def _written_by(self, rank: int) -> str:
        path = _stack_path(self.folder, rank)
        return (path.read_text() if path.exists() else "") or "(no stack)"

    def end(self) -> None:
        gone_by = time.monotonic() + DUMP_SECONDS
        done = all(connection.poll() for connection in self.connections)
        for process in self.processes:
            if done:
                process.join(max(0.0, gone_by - time.monotonic()))
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        for connection in self.connections:
            connection.close()


def _stack_path(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}.txt"


def _run_rank(
    rank: int,
    world_size: int,
    folder: Path,
    call: bytes,
    sender: Connection,
    deadline_seconds: float,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with _stack_path(folder, rank).open("w") as stack_file:
        faulthandler.enable(file=stack_file)  # a segmentation fault tells where, too
        faulthandler.dump_traceback_later(deadline_seconds, file=stack_file)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder / 'rendezvous'}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=10 * deadline_seconds),
            )
            fn, args = pickle.loads(call)
            result = fn(*args)
            # Plain pickle: the multiprocessing one would hand tensors over through shared memory
            # of a process that is about to leave.
            message = pickle.dumps((True, result))
            # Without it a rank may close its connections while another is still in a collective,
            # and gloo aborts.
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
    with contextlib.suppress(BrokenPipeError):
        sender.send_bytes(message)
    sender.close()
