from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megatron_bert.checkpoint.manifest import JSON, Manifest
from megatron_bert.checkpoint.store import CheckpointStore
from tests.checkpoint.sharded_state import (
    SPLITS,
    assert_same_bits,
    blank,
    sharded,
    state_bytes,
    whole_state,
)
from tests.distributed_harness import run_ranks

STATE: dict[str, JSON] = {
    "step": 12,
    "consumed_rows": 2**53 + 1,
    "loss": 0.1,
    "topology": {"dp": 1, "tp": [1]},
}


def _save(root: Path, tensor_parallel: int, max_file_bytes: int = 1 << 30) -> Path:
    store = CheckpointStore(root, keep=3, max_file_bytes=max_file_bytes)
    return store.save(12, sharded(whole_state(), tensor_parallel), STATE)


def _load_and_compare(root: Path, tensor_parallel: int) -> None:
    store = CheckpointStore(root, keep=3)
    path = store.newest()
    assert path is not None
    tensors = sharded(blank(whole_state()), tensor_parallel)
    assert store.load(path, tensors) == STATE
    assert_same_bits(tensors, whole_state())


@pytest.mark.parametrize(("world", "tensor_parallel"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_any_topology_loads_what_another_saved(
    tmp_path: Path, world: int, tensor_parallel: int
) -> None:
    run_ranks(world, _save, tmp_path, tensor_parallel)
    for load_world, load_parallel in [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (4, 4)]:
        run_ranks(load_world, _load_and_compare, tmp_path, load_parallel)


def test_one_process_without_a_process_group_saves_and_loads(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    path = store.save(12, whole_state(), STATE)
    tensors = blank(whole_state())
    assert store.load(path, tensors) == STATE
    assert_same_bits(tensors, whole_state())


def test_a_tensor_that_all_ranks_hold_is_stored_once(tmp_path: Path) -> None:
    folder = run_ranks(4, _save, tmp_path, 2)[0]
    held = dict.fromkeys(whole_state(), 0)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                held[name] += file.get_tensor(name).nbytes
    assert sum(held.values()) == state_bytes(whole_state())
    assert all(held[name] == tensor.nbytes for name, tensor in whole_state().items())


def test_files_are_split_at_the_size_asked_for(tmp_path: Path) -> None:
    folder = run_ranks(2, _save, tmp_path, 1, 200)[0]
    sizes = []
    for name in Manifest.read(folder).files:
        with safe_open(folder / name, framework="pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
            sizes.append(sum(tensor.nbytes for tensor in tensors))
            assert sizes[-1] <= 200 or len(tensors) == 1
    assert len(sizes) > 4
    run_ranks(2, _load_and_compare, tmp_path, 2)


class _Layers(nn.Module):
    """Column- and row-parallel weights over tp, then fully sharded over dp."""

    def __init__(self, world: int, tensor_parallel: int) -> None:
        super().__init__()
        mesh = init_device_mesh(
            "cpu", (world // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp")
        )
        generator = torch.Generator().manual_seed(5)
        for name, dim, shape in (("column", 0, (12, 6)), ("row", 1, (6, 12)), ("bias", 0, (12,))):
            whole = torch.randn(*shape, generator=generator)
            parameter = nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(dim)]))
            self.register_parameter(name, parameter)
        fully_shard(self, mesh=mesh["dp"])

    def step(self) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        for parameter in self.parameters():
            assert isinstance(parameter, DTensor)
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        return optimizer


def _flat_state(model: _Layers, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"optim.{name}.{key}"] = value
    return tensors


def _whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        for name, tensor in tensors.items()
    }


def _save_layers(root: Path, tensor_parallel: int) -> dict[str, torch.Tensor]:
    model = _Layers(dist.get_world_size(), tensor_parallel)
    tensors = _flat_state(model, model.step())
    CheckpointStore(root, keep=1).save(1, tensors, {})
    return _whole(tensors)


def _load_layers(root: Path, tensor_parallel: int) -> dict[str, torch.Tensor]:
    model = _Layers(dist.get_world_size(), tensor_parallel)
    optimizer = model.step()
    model.step()
    tensors = _flat_state(model, optimizer)
    store = CheckpointStore(root, keep=1)
    path = store.newest()
    assert path is not None
    store.load(path, tensors)
    return _whole(tensors)


def test_fully_sharded_weights_and_adamw_states_reload_under_another_split(tmp_path: Path) -> None:
    expected = run_ranks(4, _save_layers, tmp_path, 2)[0]
    for world, tensor_parallel in [(1, 1), (2, 2), (3, 1), (4, 4), (4, 2)]:
        for actual in run_ranks(world, _load_layers, tmp_path, tensor_parallel):
            assert_same_bits(actual, expected)


def test_every_sharded_tensor_of_the_fixture_exists() -> None:
    assert SPLITS.keys() < whole_state().keys()
