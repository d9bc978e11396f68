from __future__ import annotations

from datetime import timedelta

import torch

from megatron_bert.distributed.topology import MESH_AXES, Topology
from tests.distributed_harness import run_ranks


def _timeouts(seconds: float) -> list[timedelta]:
    topology = Topology.build(torch.device("cpu"), tensor=2, timeout_seconds=seconds)
    groups = [topology.mesh.get_group(axis) for axis in MESH_AXES]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_collectives_along_every_axis_wait_no_longer_than_was_asked_for() -> None:
    assert run_ranks(2, _timeouts, 77.0) == [[timedelta(seconds=77)] * 4] * 2


def _place() -> tuple[int, int, int]:
    topology = Topology.build(torch.device("cpu"), tensor=2)
    return (
        topology.data_parallel_size,
        topology.data_parallel_rank,
        topology.tensor_parallel.rank,
    )


def test_neighbouring_ranks_share_a_tensor_parallel_group_and_data_takes_the_rest() -> None:
    assert run_ranks(4, _place) == [(2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)]
