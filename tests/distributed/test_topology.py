from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch

from megatron_bert.distributed import launch
from megatron_bert.distributed.topology import MESH_AXES, Topology
from megatron_bert.errors import ConfigError
from tests.distributed_harness import run_ranks


def _timeouts(seconds: float) -> list[timedelta]:
    topology = Topology.build(torch.device("cpu"), tensor=2, timeout_seconds=seconds)
    groups = [topology.mesh.get_group(axis) for axis in MESH_AXES]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_collectives_along_every_axis_wait_no_longer_than_was_asked_for() -> None:
    assert run_ranks(2, _timeouts, 77.0) == [[timedelta(seconds=77)] * 4] * 2


class _Group:
    """Of gloo and NCCL; it notes the timeouts that are set."""

    def __init__(self) -> None:
        self.hosts: timedelta | None = None
        self.devices: timedelta | None = None

    def _get_backend(self, device: torch.device) -> _Group:
        assert device.type == "cuda"
        return self

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.devices = timeout


def test_messages_of_devices_may_take_longer_than_those_of_hosts_and_the_roll_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def set_both(timeout: timedelta, group: _Group) -> None:
        group.hosts = group.devices = timeout

    monkeypatch.setattr(launch, "_set_pg_timeout", set_both)
    group = _Group()
    launch.set_timeout(group, torch.device("cuda", 0), 77.0)
    assert (group.hosts, group.devices) == (timedelta(seconds=77), timedelta(seconds=107))


def _place() -> tuple[int, int, int]:
    topology = Topology.build(torch.device("cpu"), tensor=2)
    return (
        topology.data_parallel_size,
        topology.data_parallel_rank,
        topology.tensor_parallel.rank,
    )


def test_neighbouring_ranks_share_a_tensor_parallel_group_and_data_takes_the_rest() -> None:
    assert run_ranks(4, _place) == [(2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)]


def _speaks() -> tuple[bool, bool]:
    topology = Topology.build(torch.device("cpu"), pipeline=2, tensor=2)
    return topology.speaks_for_its_rows, topology.speaks_for_its_loss


def test_the_first_rank_speaks_for_rows_and_the_first_that_holds_the_head_for_losses() -> None:
    others = (False, False)
    assert run_ranks(4, _speaks) == [(True, False), others, (False, True), others]


@pytest.mark.parametrize(("given", "ranks"), [("", None), ("4", 4)])
def test_an_empty_number_of_ranks_is_none(
    monkeypatch: pytest.MonkeyPatch, given: str, ranks: int | None
) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    assert launch.announced_world_size() == ranks


def test_a_meeting_place_that_is_taken_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**found, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=rf"MASTER_PORT={port}: .*use the first rank's host"):
            launch.process_group(torch.device("cpu"), 5.0).__enter__()
