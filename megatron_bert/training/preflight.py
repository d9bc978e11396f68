"""Checks before the first step: all ranks see one run directory, agree, and exchange messages."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import _megatron_bert_core as core
import torch
import torch.distributed as dist

import megatron_bert
from megatron_bert.config.diagnostics import format_value
from megatron_bert.config.keys import dotted
from megatron_bert.config.leaves import leaves
from megatron_bert.distributed.agreement import Ranks
from megatron_bert.distributed.device_work import wait_for_device
from megatron_bert.errors import RunError, UserError
from megatron_bert.words import numbered

# A network file system may show a new file to another node only after a while.
_VISIBLE_WITHIN_SECONDS = 10.0
_LOOK_AGAIN_SECONDS = 0.1
# Large enough that the network's bandwidth counts and not its latency.
_ALL_REDUCE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
# Ranks contribute this many different numbers, so that one left out or counted twice changes the
# sum, and yet fp32 holds the sum over half a million ranks exactly, in whatever order they are
# added.
_DIFFERENT_NUMBERS = 64
# Stands in for a fact that a rank lacks when facts are compared.
_ABSENT = "absent"


class CommunicationError(RunError):
    """The ranks' messages arrive, but with the wrong content."""


def check_run_directory_is_shared(
    path: Path, wait_seconds: float = _VISIBLE_WITHIN_SECONDS
) -> None:
    """Check that all ranks see in the run directory what the first one writes. Collective.

    Args:
        path: the run directory, which the first rank has made.
        wait_seconds: how long a file may take to be seen.

    Raises:
        UserError: some do not; the message names them and their hosts.
    """
    ranks = Ranks()

    def write_token() -> str:
        name = f".seen-{secrets.token_hex(8)}"
        try:
            (path / name).write_text(name)
        except OSError as error:
            with suppress(OSError):
                (path / name).unlink(missing_ok=True)
            raise UserError(
                f"run.dir {path}: nothing can be written there ({error.strerror}); free space on "
                "its disk, or use another run.dir, and give the same command again"
            ) from error
        return name

    name = ranks.on_first(write_token)
    try:
        hosts = ranks.on_all(socket.gethostname)
        seen = ranks.on_all(lambda: _is_seen(path / name, name, wait_seconds))
    finally:
        if ranks.rank == 0:
            (path / name).unlink(missing_ok=True)
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"run.dir {path} (from {Path.cwd()}): {_who(blind, hosts)} cannot see what rank 0 "
            f"(host {hosts[0]}) wrote there; set run.dir to an absolute path on a file system that "
            "all nodes share"
        )


def check_ranks_agree(facts: Mapping[str, object]) -> None:
    """Check that all ranks hold the same facts. Collective.

    Only a digest is exchanged unless the digests differ.

    Args:
        facts: JSON values by name; nested values are compared key by key.

    Raises:
        UserError: some ranks hold other facts than most; the message names them, their hosts and
            the facts.
    """
    ranks = Ranks()
    text = json.dumps(facts, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(set(ranks.on_all(lambda: digest))) == 1:
        return
    hosts = ranks.on_all(socket.gethostname)
    held = [
        {dotted(path): value for path, value in leaves(json.loads(its), with_empty=True)}
        for its in ranks.on_all(lambda: text)
    ]
    names = dict.fromkeys(name for its in held for name in its)
    problems = [
        problem
        for name in names
        if (problem := _difference(name, [its.get(name, _ABSENT) for its in held], hosts))
    ]
    raise UserError(
        "\n".join(problems)
        + "\nthe ranks must agree in this: start all of them from the same checkout, with the same "
        "command line, on the same data"
    )


def code_facts() -> dict[str, str]:
    """This rank's versions, and hashes of its Python sources and of the data core's sources."""
    root = Path(megatron_bert.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return {
        "version of megatron_bert": megatron_bert.__version__,
        "hash of megatron_bert's code": digest.hexdigest()[:16],
        # A core built before it had this attribute would otherwise fail here without naming a host.
        "hash of the data core's sources": getattr(core, "SOURCE_HASH", "an older build")[:16],
        "version of torch": torch.__version__,
    }


def measure_all_reduce(device: torch.device) -> str | None:
    """Try an all-reduce over all ranks, and say how fast it was; None with a single rank.

    The bandwidth is what each rank's link carries in a ring, 2 (n - 1) / n of the bytes divided by
    the time, so that it can be compared across numbers of ranks.

    Raises:
        CommunicationError: the sum is wrong.
    """
    ranks = dist.get_world_size()
    if ranks == 1:
        return None
    size = _ALL_REDUCE_BYTES[device.type]
    numbers = torch.empty(size // 4, device=device)
    seconds = 0.0
    # The first all-reduce also connects the ranks; the second is the one that is timed.
    for _ in range(2):
        numbers.fill_(_number_of(dist.get_rank()))
        wait_for_device(device)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        wait_for_device(device)
        seconds = time.perf_counter() - began
    low, high = (float(value) for value in numbers.aminmax())
    expected = sum(map(_number_of, range(ranks)))
    if not low == high == expected:
        raise CommunicationError(
            f"an all-reduce over {ranks:,} ranks gave sums from {low:g} to {high:g} instead of "
            f"{expected:g} on rank {dist.get_rank()} (host {socket.gethostname()}); the network or "
            "its driver corrupts data: leave this host out"
        )
    bandwidth = 2 * (ranks - 1) / ranks * size / seconds / 1e9
    return (
        f"all-reduce  {size >> 20} MiB over {ranks:,} ranks in {1e3 * seconds:.1f} ms, "
        f"{bandwidth:.2f} GB/s a rank"
    )


def _number_of(rank: int) -> float:
    """The number that a rank contributes to the trial sum."""
    return 1.0 + rank % _DIFFERENT_NUMBERS


def _is_seen(path: Path, content: str, wait_seconds: float) -> bool:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_AGAIN_SECONDS)


def _difference(name: str, values: Sequence[Any], hosts: Sequence[str]) -> str | None:
    """Describe in a line how a fact differs between ranks; None if it does not."""
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(json.dumps(value), []).append(rank)
    if len(ranks_by_value) == 1:
        return None
    # On a tie, the group with the lowest rank.
    usual = max(ranks_by_value.values(), key=len)
    others = [
        f"{format_value(values[ranks[0]])} on {_who(ranks, hosts)}"
        for ranks in ranks_by_value.values()
        if ranks is not usual
    ]
    return f"{name} is {', '.join(others)}, but {format_value(values[usual[0]])} on " + (
        f"rank {usual[0]}" if len(usual) == 1 else f"{len(usual):,} ranks, such as rank {usual[0]}"
    )


def _who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks by their numbers, with their hosts."""
    names = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{numbered('rank', ranks)} (host {names})"
