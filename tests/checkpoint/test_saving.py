from __future__ import annotations

import errno
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_bert.checkpoint.manifest import JSON, file_checksum
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.errors import CheckpointError
from tests.checkpoint.host_calls import HostCall, before_host_calls, disk_full_at
from tests.checkpoint.sharded_state import sharded, state_bytes, whole_state
from tests.distributed_harness import run_ranks

TENSORS = {"weight": torch.arange(6.0)}


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_new_store_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", keep=1).newest() is None


def test_latest_names_the_newest_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        assert store.save(step, TENSORS, {}) == tmp_path / f"step_0000000{step}"
        assert (tmp_path / "latest").read_text() == f"step_0000000{step}\n"


@pytest.mark.parametrize("latest", [None, "step_00000001\n", "nonsense"])
def test_the_newest_complete_one_counts_whatever_latest_says(
    tmp_path: Path, latest: str | None
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, TENSORS, {})
    path = store.save(2, TENSORS, {})
    (tmp_path / "latest").unlink()
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    assert CheckpointStore(tmp_path, keep=2).newest() == path


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(99_999_999, TENSORS, {})
    path = store.save(100_000_000, TENSORS, {})
    assert store.newest() == path


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_keep_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    store = CheckpointStore(tmp_path, keep=keep)
    for step in range(1, 6):
        store.save(step, TENSORS, {})
    kept = [f"step_0000000{step}" for step in range(6 - keep, 6)]
    assert _names(tmp_path) == ["latest", *kept]


def test_a_later_damaged_step_never_pushes_out_the_one_just_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(9, TENSORS, {})
    (tmp_path / "step_00000009" / "manifest.json").unlink()
    path = store.save(5, TENSORS, {})
    assert _names(tmp_path) == ["latest", "step_00000005", "step_00000009"]
    assert store.newest() == path


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, TENSORS, {"run": 1})
    path = store.save(5, {"weight": torch.full((6,), 2.0)}, {"run": 2})
    loaded = {"weight": torch.zeros(6)}
    assert store.load(path, loaded) == {"run": 2}
    assert loaded["weight"].tolist() == [2.0] * 6
    assert _names(tmp_path) == ["latest", "step_00000005"]


def test_leftovers_of_this_store_alone_are_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    path = store.save(5, TENSORS, {})
    path.rename(tmp_path / "step_00000007.tmp-0a1b2c3d")
    (tmp_path / "latest.tmp-00ff00ff").touch()
    others = ["notes.tmp-00ff00ff", "step_00000003.tmp-mine", "step_3.tmp-00"]
    for name in others:
        (tmp_path / name).mkdir()
    assert store.newest() is None, "a temporary folder was taken for a checkpoint"
    store.remove_leftovers()
    assert _names(tmp_path) == sorted(["latest", *others])


def test_saving_removes_leftovers_too(tmp_path: Path) -> None:
    (tmp_path / "step_00000007.tmp-0a1b2c3d").mkdir()
    CheckpointStore(tmp_path, keep=1).save(8, TENSORS, {})
    assert _names(tmp_path) == ["latest", "step_00000008"]


def test_a_checkpoint_that_cannot_be_removed_stops_no_later_save_and_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As on NFS, where another process has one of its files open.
    def refuse(call: HostCall) -> None:
        if call.name == "rmdir" and call.path.name.startswith("step_00000001"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    store = CheckpointStore(tmp_path, keep=1)
    with before_host_calls(refuse):
        for step in (1, 2, 3):
            store.save(step, TENSORS, {})
        store.remove_leftovers()
    assert store.newest() == tmp_path / "step_00000003"
    assert "Directory not empty" in caplog.text
    assert "renamed" not in caplog.text, "a checkpoint that was given up came back"
    store.save(4, TENSORS, {})
    assert _names(tmp_path) == ["latest", "step_00000004"]


def test_a_complete_checkpoint_counts_though_latest_could_not_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(call: HostCall) -> None:
        if call.path.name.startswith("latest") and call.name == "open":
            raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, TENSORS, {})
    with before_host_calls(refuse):
        path = store.save(2, TENSORS, {})
    assert store.newest() == path
    assert _names(tmp_path) == ["latest", "step_00000002"]
    assert f"{path} is saved" in caplog.text


def test_of_a_save_killed_while_it_replaced_a_checkpoint_the_newer_one_is_kept(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for run, name in enumerate(("step_00000005.tmp-0000000f", "step_00000005.tmp-0000000a")):
        folder = store.save(5, TENSORS, {"run": run})
        os.utime(folder, (run, run))
        folder.rename(tmp_path / name)
    store.remove_leftovers()
    newest = store.newest()
    assert newest == tmp_path / "step_00000005"
    assert store.read_state(newest) == {"run": 1}
    assert _names(tmp_path) == ["latest", "step_00000005"]


def test_the_manifest_tells_version_step_state_and_files(tmp_path: Path) -> None:
    state: dict[str, JSON] = {
        "consumed_rows": 64,
        "config": {"run": {"seed": 1}},
        "文字": "テスト",
        "lr": 0.1,
    }
    path = CheckpointStore(tmp_path, keep=1).save(5, TENSORS, state)
    content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert (content["version"], content["step"], content["state"]) == (1, 5, state)
    assert _names(path) == sorted(["manifest.json", *content["files"]])
    for name, record in content["files"].items():
        assert record["size"] == (path / name).stat().st_size
        assert record["checksum"] == file_checksum(path / name)


def test_the_state_can_be_read_without_the_tensors(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    assert store.read_state(store.save(5, TENSORS, {"step": 5})) == {"step": 5}
    with pytest.raises(CheckpointError, match="no such folder"):
        store.read_state(tmp_path / "step_00000006")


def test_a_state_that_is_no_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not JSON serializable"):
        CheckpointStore(tmp_path, keep=1).save(5, TENSORS, {"bad": {1, 2}})  # type: ignore[dict-item]
    assert _names(tmp_path) == []


def test_a_host_that_allows_no_larger_file_is_named_as_what_stops_a_save(tmp_path: Path) -> None:
    def refuse(call: HostCall) -> None:
        if call.name == "write" and call.path.match("shard-*"):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    with before_host_calls(refuse), pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path, keep=1).save(1, TENSORS, {})
    assert "File too large; raise the largest size of a file that the host allows" in str(
        caught.value
    )
    assert "can write there" not in str(caught.value)


def _save_with_a_full_disk(root: Path, bad_rank: int, name: str, pattern: str) -> str:
    store = CheckpointStore(root, keep=1)
    store.save(1, sharded(whole_state(), 1), {})
    tensors = sharded(whole_state(), 1)
    refuse = disk_full_at(name, pattern)
    bad = before_host_calls(refuse) if dist.get_rank() == bad_rank else nullcontext()
    with bad, pytest.raises(CheckpointError) as caught:
        store.save(2, tensors, {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("bad_rank", "name", "pattern"),
    [
        (0, "mkdir", "step_*.tmp-*"),
        (0, "open", "shard-*"),
        (0, "write", "shard-*"),
        (1, "write", "shard-*"),
        (1, "fsync", "shard-*"),
        (0, "write", "manifest.json"),
        (0, "fsync", "step_*.tmp-*"),
        (0, "rename", "step_*.tmp-*"),
    ],
)
def test_a_full_disk_on_one_rank_is_told_by_all_and_costs_no_checkpoint(
    tmp_path: Path, bad_rank: int, name: str, pattern: str
) -> None:
    messages = run_ranks(2, _save_with_a_full_disk, tmp_path, bad_rank, name, pattern)
    assert messages[0] == messages[1]
    assert f"cannot save {tmp_path / 'step_00000002'}: rank {bad_rank}: " in messages[0]
    assert "No space left" in messages[0]
    assert f"needs a little more than {state_bytes(whole_state()):,} bytes" in messages[0]
    assert " are free without it. Older checkpoints are intact" in messages[0]
    assert "; make room, lower checkpoint.keep" in messages[0]
    assert _names(tmp_path) == ["latest", "step_00000001"]
    assert CheckpointStore(tmp_path, keep=1).newest() == tmp_path / "step_00000001"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot save .*file.*step_00000001"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=1).save(1, TENSORS, {})


def _save_what_only_some_ranks_have(root: Path) -> None:
    rank = dist.get_rank()
    own = {f"model.blocks.{rank}.weight": torch.full((3,), float(rank))}
    store = CheckpointStore(root, keep=1)
    path = store.save(1, own, {})
    loaded = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    store.load(path, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())


def test_pipeline_stages_save_and_load_their_own_tensors(tmp_path: Path) -> None:
    run_ranks(2, _save_what_only_some_ranks_have, tmp_path)


def _save_what_two_stages_share(root: Path) -> None:
    pipeline, rows = 2, torch.arange(24.0).view(8, 3)
    mesh = init_device_mesh("cpu", (pipeline, 2), mesh_dim_names=("pp", "dp"))
    tied = distribute_tensor(rows, mesh["dp"], [Shard(0)])
    path = CheckpointStore(root, keep=1).save(1, {"model.tied": tied}, {})
    assert len(list(path.glob("*.safetensors"))) == 2, "each half is written by one rank"
    loaded = {"model.tied": distribute_tensor(torch.zeros(8, 3), mesh["dp"], [Shard(0)])}
    CheckpointStore(root, keep=1).load(path, loaded)
    assert torch.equal(loaded["model.tied"].full_tensor(), rows)


def test_a_weight_that_two_pipeline_stages_share_is_stored_once(tmp_path: Path) -> None:
    run_ranks(4, _save_what_two_stages_share, tmp_path)
    whole = {"model.tied": torch.zeros(8, 3)}
    store = CheckpointStore(tmp_path, keep=1)
    store.load(tmp_path / "step_00000001", whole)
    assert whole["model.tied"].tolist() == torch.arange(24.0).view(8, 3).tolist()
