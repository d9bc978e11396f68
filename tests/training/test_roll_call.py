from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bert.config.schema import Config
from megatron_bert.distributed.device_work import DeviceStalledError
from megatron_bert.errors import details_of
from megatron_bert.run.mirrors.processes import Mirrors
from megatron_bert.training import job
from megatron_bert.training import roll_call as module
from megatron_bert.training.roll_call import PeersLostError, RollCall
from megatron_bert.training.trainer import RunEnd
from tests.distributed_harness import run_ranks

SECONDS = 30.0


def with_store(store: Any, ranks: int, seconds: float) -> RollCall:
    """Make the roll call of rank 0 of several in a store, without a process group or a thread."""
    roll_call = RollCall.__new__(RollCall)
    roll_call._store, roll_call._rank, roll_call._size = store, 0, ranks
    roll_call._answer_within = seconds
    roll_call._ended, roll_call._threads = threading.Event(), []
    roll_call._main_thread = threading.get_ident()
    return roll_call


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


def _call_with_a_silent_rank(of_a_device: bool) -> str | None:
    # The last rank's thread is not there, as if its process were stopped.
    last = dist.get_rank() == dist.get_world_size() - 1
    roll_call = RollCall(answer_within_seconds=6.0)
    if last:
        roll_call.close()
    _meet("silent")
    error = DeviceStalledError("waits") if of_a_device else _wait_in_vain()
    reason = None if last else str(roll_call.explain(error))
    assert "gloo" not in (reason or "")
    _meet("done")
    roll_call.close()
    return reason


@pytest.mark.parametrize("of_a_device", [False, True])
def test_a_rank_that_does_not_answer_is_named_by_the_others(of_a_device: bool) -> None:
    *named, silent = run_ranks(3, _call_with_a_silent_rank, of_a_device)
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


def _start_again() -> tuple[list[bool], str | None]:
    """Ranks of one store begin anew, as under `torchrun --max-restarts`, and none fails itself."""
    first = RollCall(answer_within_seconds=20.0)
    error = _wait_in_vain()
    first.explain(error)
    _meet("failed")
    first.close()
    second = RollCall(answer_within_seconds=20.0)
    seen = [second._store.check([key]) for key in ("called", "failed", "answer of 0")]
    _meet("looked")
    is_last = dist.get_rank() == dist.get_world_size() - 1
    reason = None if is_last else str(second.explain(error))
    _meet("done")
    second.close()
    return seen, reason


def test_what_ranks_said_before_they_were_started_again_does_not_count() -> None:
    (seen, reason), (also_seen, _) = run_ranks(2, _start_again)
    assert seen == also_seen == [False] * 3
    assert reason is not None
    assert "all ranks are alive" in reason


class _CountingStore:
    """A store in which all ranks have answered but one; it counts what it is asked."""

    def __init__(self, silent: int) -> None:
        self.asked = 0
        self._silent = silent

    def set(self, key: str, value: str) -> None:
        self.asked += 1

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        return not any(key in ("failed", f"answer of {self._silent}") for key in keys)

    def get(self, key: str) -> bytes:
        self.asked += 1
        return b'{"host": "node", "process": 1}'


def test_a_look_asks_the_store_a_few_things_however_many_ranks_there_are() -> None:
    ranks = 512
    store = _CountingStore(silent=300)
    roll_call = with_store(store, ranks, seconds=1.0)
    assert roll_call._find_reason().startswith("rank 300 (host node, process 1) stopped answering")
    # Two a look at most ten times a second, then one a rank.
    assert store.asked < ranks + 2 * 20


class _LateStore(_CountingStore):
    """A store that has all answers from the second look on, and nobody's failure."""

    def __init__(self) -> None:
        super().__init__(silent=-1)
        self._looks = 0

    def check(self, keys: list[str]) -> bool:
        self._looks += keys[0] == "answer of 0" and len(keys) > 1
        return self._looks > 1 and super().check(keys)


def test_ranks_are_looked_for_once_more_after_the_deadline() -> None:
    assert "all ranks are alive" in with_store(_LateStore(), ranks=4, seconds=0.0)._find_reason()


class _FailingStore:
    """A store that fails at first, and has called the ranks after that."""

    def __init__(self, error: Exception, failures: int) -> None:
        self.answered: list[str] = []
        self._error = error
        self._failures = failures

    def check(self, keys: list[str]) -> bool:
        self._failures -= 1
        if self._failures >= 0:
            raise self._error
        return True

    def set(self, key: str, value: str) -> None:
        if self._failures > 0:
            raise self._error
        self.answered.append(key)


def test_a_rank_answers_though_the_store_failed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    store = _FailingStore(dist.DistNetworkError("reset"), failures=2)
    roll_call = with_store(store, ranks=2, seconds=SECONDS)
    roll_call._start("roll-call", roll_call._listen).join(SECONDS)
    assert store.answered == ["answer of 0"]


@pytest.mark.parametrize("failure", [dist.DistStoreError("gone"), TypeError("no text")])
def test_no_failure_of_the_store_hides_an_error(failure: Exception) -> None:
    roll_call = with_store(_FailingStore(failure, failures=10), ranks=2, seconds=SECONDS)
    error = ValueError("row 7 is bad")
    assert roll_call.explain(error) is error
    lost = roll_call.explain(dist.DistNetworkError("connection lost"))
    assert isinstance(lost, PeersLostError)
    assert "connection lost" not in str(lost)
    assert details_of(lost)[0] == "the message that failed here: connection lost"


def test_an_error_is_told_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    error = ValueError("row 7 is bad")
    assert with_store(_LateStore(), ranks=2, seconds=SECONDS).explain(error) is error


def _fail_with_a_foreign_name() -> tuple[str, str]:
    roll_call = RollCall(answer_within_seconds=20.0)
    error = ValueError("\udc93.bin: cannot read")
    assert roll_call.explain(error) is error
    told = roll_call._store.get("failure").decode()
    roll_call.close()
    return type(error).__name__, told


def test_a_name_that_is_no_utf8_is_told_all_the_same() -> None:
    (kind, told), _ = run_ranks(2, _fail_with_a_foreign_name)
    assert (kind, told) == ("ValueError", r"ValueError: \udc93.bin: cannot read")


# Stops itself, and with it the store that it holds, once the client is served.
STORE = """
import os, signal, sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_store_that_answers_nothing_holds_nobody() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdin is not None
        assert server.stdout is not None
        store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
        roll_call = with_store(store, ranks=2, seconds=1.0)
        server.stdin.write("stop\n")
        server.stdin.flush()
        os.waitpid(server.pid, os.WUNTRACED)
        began = time.monotonic()
        reason = roll_call.explain(dist.DistNetworkError("connection lost"))
        assert time.monotonic() - began < SECONDS
        assert isinstance(reason, PeersLostError)
        assert "rank 0 or the launcher, where they meet, may be gone" in str(reason)
    finally:
        server.kill()
        server.communicate()


# Leaves while a thread waits for a stopped store, which ends as the interpreter takes itself down.
LEAVE = """
import os, signal, sys, time
import torch.distributed as dist
from tests.training.test_roll_call import with_store

class EndsTheStore:
    def __del__(self, kill=os.kill, process=int(sys.argv[2]), wait=time.sleep):
        kill(process, signal.SIGKILL)
        wait(1.0)

roll_call = with_store(dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False), 2, 0.2)
print("served", flush=True)
sys.stdin.readline()
sys.modules["ends the store"] = EndsTheStore()
with roll_call:
    raise roll_call.explain(dist.DistNetworkError("connection lost"))
"""


def test_a_thread_that_waits_for_a_stopped_store_does_not_change_the_exit_code() -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", STORE], **pipes)
    try:
        assert server.stdin is not None
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        rank = subprocess.Popen(
            [sys.executable, "-c", LEAVE, port, str(server.pid)],
            **pipes,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "served\n"
            server.stdin.write("stop\n")
            server.stdin.flush()
            os.waitpid(server.pid, os.WUNTRACED)
            _, errors = rank.communicate("go\n", timeout=SECONDS)
        finally:
            rank.kill()
            rank.communicate()
        assert rank.returncode == 1, errors
        assert "PeersLostError: messages between ranks failed" in errors
    finally:
        server.kill()
        server.communicate()


class _Stops:
    interrupt = None


class _Explains:
    """Notes what `FAILED` said while the roll was called."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.stood = ""

    def explain(self, error: BaseException) -> BaseException:
        self.stood = (self._folder / "FAILED").read_text()
        return PeersLostError("rank 1 is gone")


def _fail_at_a_message(config: Config) -> str:
    config.run.directory.mkdir()
    roll_call = _Explains(config.run.directory)
    with (
        pytest.raises(PeersLostError, match="rank 1 is gone"),
        job._failure_told(config, _Stops(), roll_call),
    ):
        raise dist.DistNetworkError("connection lost")
    return roll_call.stood


def test_the_bare_error_stands_in_failed_while_the_roll_is_called(tiny_run: Any) -> None:
    config = tiny_run()
    (stood,) = run_ranks(1, _fail_at_a_message, config)
    assert "connection lost" in stood
    assert "rank 1 is gone" in (config.run.directory / "FAILED").read_text()


class _Trainer:
    """Has taken its steps."""

    step = 1

    def __init__(self, *_: object) -> None:
        pass

    def run(self, *_: object) -> RunEnd:
        return RunEnd(step=1, stop_reason=None)


def _lose_a_rank_at_the_end(config: Config) -> None:
    def fail() -> None:
        raise dist.DistNetworkError("connection lost")

    barrier, job.Trainer, dist.barrier = dist.barrier, _Trainer, fail
    try:
        with pytest.raises(dist.DistNetworkError):
            job._run(config, torch.device("cpu"), _Stops(), RollCall(), Mirrors(), None)
    finally:
        dist.barrier = barrier


def test_a_run_that_loses_a_rank_after_the_last_step_is_not_called_finished(tiny_run: Any) -> None:
    config = tiny_run()
    run_ranks(1, _lose_a_rank_at_the_end, config)
    assert (config.run.directory / "FAILED").exists()
    assert not (config.run.directory / "FINISHED").exists()


def _alone() -> bool:
    roll_call = RollCall()
    error = ValueError("bad")
    roll_call.close()
    return roll_call.explain(error) is error


@pytest.mark.parametrize(
    ("error", "leaves"),
    [
        (PeersLostError("rank 1 is gone"), True),
        (ValueError("caught, and the script goes on"), False),
    ],
)
def test_a_process_leaves_at_once_only_where_its_device_may_wait_for_a_lost_rank(
    error: Exception, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module.atexit, "register", lambda function, code: registered.append(code))
    with pytest.raises(type(error)), with_store(None, 2, 1.0):
        raise error
    assert registered == ([1] if leaves else [])


def test_a_single_rank_has_nobody_to_call() -> None:
    assert run_ranks(1, _alone) == [True]
