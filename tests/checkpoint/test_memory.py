"""What a save takes of the host's memory beside the state: the copied state, and next to nothing.

Promised is less than twice a file; a writer that makes a file in memory first takes just that.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megatron_bert.benchmark.process import peak_resident_megabytes, resident_megabytes
from megatron_bert.checkpoint.manifest import Manifest
from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.checkpoint.store import CheckpointStore
from tests.distributed_harness import run_ranks

FILE_BYTES = 1 << 25
TENSOR_BYTES = 1 << 23
TENSORS = 12
STATE_MB = TENSORS * TENSOR_BYTES / 1e6
FILE_MB = FILE_BYTES / 1e6


def _state() -> dict[str, torch.Tensor]:
    """Three files' worth on each rank, every page of it touched."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        f"model.{number}": DTensor.from_local(
            torch.full((TENSOR_BYTES // 4096, 1024), float(number)), mesh, [Shard(0)]
        )
        for number in range(TENSORS)
    }


def _measure(root: Path, in_background: bool) -> float:
    """Return how far above its level before the save this process' memory rose, in MB."""
    store = CheckpointStore(root, keep=1, max_file_bytes=FILE_BYTES)
    saver = CheckpointSaver(store, in_background=in_background, max_failures=1)
    # What a first save imports is no part of it.
    saver.save(1, {"small": torch.zeros(1)}, {})
    saver.finish()
    state = _state()
    gc.collect()
    before_mb = resident_megabytes()
    saver.save(2, state, {})
    saver.finish()
    sizes = [record.size for record in Manifest.read(root / "step_00000002").files.values()]
    assert len(sizes) == 3 * dist.get_world_size()
    assert max(sizes) < FILE_BYTES + 10_000
    return peak_resident_megabytes() - before_mb


@pytest.mark.parametrize(("in_background", "copied_mb"), [(False, 0.0), (True, STATE_MB)])
def test_a_save_takes_the_copied_state_and_no_file_in_memory(
    tmp_path: Path, in_background: bool, copied_mb: float
) -> None:
    for rise_mb in run_ranks(2, _measure, tmp_path, in_background):
        assert rise_mb < copied_mb + FILE_MB / 4
