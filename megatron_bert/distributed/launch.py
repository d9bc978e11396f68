"""Start and end of the process group, under torchrun or alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _set_pg_timeout

from megatron_bert.config.schema import DeviceChoice
from megatron_bert.errors import ConfigError

# NCCL's watchdog ends the process without a word. Before it does, the hosts' messages (gloo) must
# time out, and the hosts must find out which ranks are gone, which takes up to 16 s.
_NCCL_MARGIN_SECONDS = 30.0
# Ranks arrive as fast as their nodes load an interpreter and torch, perhaps on a file system's
# first read: a shorter timeout, which reports a lost rank sooner, does not apply here.
_LEAST_START_SECONDS = 300.0


def choose_device(requested: DeviceChoice) -> torch.device:
    """Return this rank's device: its own GPU (by LOCAL_RANK) or the CPU.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "run.device=cuda: this machine shows PyTorch no CUDA device; "
            "set run.device=auto (or cpu), or install a CUDA build of torch"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={local_rank}, but this node shows {torch.cuda.device_count()} GPUs; "
            "start at most as many ranks a node: torchrun --nproc-per-node=gpu"
        )
    return torch.device("cuda", local_rank)


def requested_world_size() -> int:
    """The number of ranks that torchrun started (1 without torchrun)."""
    return announced_world_size() or 1


def announced_world_size() -> int | None:
    """The value of WORLD_SIZE, which torchrun sets; None if it is not set or empty."""
    given = os.environ.get("WORLD_SIZE")
    return int(given) if given else None


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Join the ranks that torchrun started, or make a group of one; leave it at the end.

    CPU tensors always travel over gloo, so that control messages (counts, stop flags) never
    touch the GPU's stream; CUDA tensors travel over NCCL. The timeout of the ranks' first meeting
    is at least `_LEAST_START_SECONDS`.

    Raises:
        ConfigError: the address where the ranks are to meet cannot be used.
    """
    _start(device, timeout_seconds)
    try:
        yield
    except BaseException:
        # The threads of a group that still exists can abort the interpreter as it exits, which
        # loses the exit code. With peers the group stays: destroying it could wait for them, and
        # torchrun ends all ranks.
        if dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    # All leave together: gloo aborts a process whose peer is gone before it.
    dist.barrier()
    dist.destroy_process_group()


def _start(device: torch.device, timeout_seconds: float) -> None:
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=max(timeout_seconds, _LEAST_START_SECONDS))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            host, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise ConfigError(
                f"MASTER_ADDR={host}, MASTER_PORT={port}: the ranks cannot meet there "
                f"({str(error).splitlines()[0]}); use the first rank's host and a port of it that "
                "is free"
            ) from error
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    world = dist.group.WORLD
    assert world is not None
    set_timeout(world, device, timeout_seconds)


def set_timeout(group: ProcessGroup, device: torch.device, seconds: float) -> None:
    """Set how long a group's messages may take: the devices' by a margin longer than the hosts'."""
    _set_pg_timeout(timedelta(seconds=seconds), group)
    if device.type == "cuda":
        backend = group._get_backend(device)
        backend._set_default_timeout(timedelta(seconds=seconds + _NCCL_MARGIN_SECONDS))


def new_host_group(timeout_seconds: float) -> ProcessGroup:
    """Make another group of all ranks, for messages of the hosts alone (gloo). Collective.

    Messages of different groups never mix, so that a thread can have a group of its own.
    """
    group: ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return group
