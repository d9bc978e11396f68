from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from megatron_bert.checkpoint import manifest as manifest_module
from megatron_bert.checkpoint import store as store_module
from megatron_bert.checkpoint import tensors as tensors_module
from megatron_bert.checkpoint.manifest import JSON
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.errors import CheckpointError
from tests.checkpoint.sharded_state import sharded, state_bytes, whole_state
from tests.distributed_harness import RankError, run_ranks

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


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep is 0"):
        CheckpointStore(tmp_path, keep=0)


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
        assert record["checksum"] == manifest_module.file_checksum(path / name)


def test_the_state_can_be_read_without_the_tensors(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    assert store.read_state(store.save(5, TENSORS, {"step": 5})) == {"step": 5}
    with pytest.raises(CheckpointError, match="no such folder"):
        store.read_state(tmp_path / "step_00000006")


def test_a_state_that_is_no_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not JSON serializable"):
        CheckpointStore(tmp_path, keep=1).save(5, TENSORS, {"bad": {1, 2}})  # type: ignore[dict-item]
    assert _names(tmp_path) == []


def _full_disk(*_args: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def _save_with_a_full_disk(root: Path, bad_rank: int, place: str) -> str:
    store = CheckpointStore(root, keep=1)
    store.save(1, sharded(whole_state(), 1), {})
    target, name = {
        "shard": (tensors_module._ChecksumStream, "write"),
        "sync": (tensors_module, "sync_to_disk"),
        "manifest": (manifest_module, "sync_to_disk"),
        "folder": (store_module, "sync_to_disk"),
    }[place]
    tensors = sharded(whole_state(), 1)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == bad_rank:
            patch.setattr(target, name, _full_disk)
        with pytest.raises(CheckpointError) as caught:
            store.save(2, tensors, {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("bad_rank", "place"),
    [(0, "shard"), (1, "shard"), (1, "sync"), (0, "manifest"), (0, "folder")],
)
def test_a_full_disk_on_one_rank_is_told_by_all_and_costs_no_checkpoint(
    tmp_path: Path, bad_rank: int, place: str
) -> None:
    messages = run_ranks(2, _save_with_a_full_disk, tmp_path, bad_rank, place)
    assert messages[0] == messages[1]
    assert f"cannot save {tmp_path / 'step_00000002'}: rank {bad_rank}: " in messages[0]
    assert "No space left" in messages[0]
    assert f"needs {state_bytes(whole_state())} bytes" in messages[0]
    assert " are free: make room" in messages[0]
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


def _save_and_die(root: Path, call: int) -> None:
    """Save step 2, but leave as by kill -9 instead of making the given call to the host."""
    calls = itertools.count()

    def dying(work: Callable[..., Any]) -> Callable[..., Any]:
        def work_or_die(*args: Any, **options: Any) -> Any:
            if next(calls) == call:
                os._exit(9)
            return work(*args, **options)

        return work_or_die

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
            patch.setattr(os, name, dying(getattr(os, name)))
        CheckpointStore(root, keep=1).save(2, {"weight": torch.full((6,), 2.0)}, {"step": 2})


def _dies(root: Path, call: int) -> bool:
    try:
        run_ranks(1, _save_and_die, root, call)
    except RankError as error:
        if "exit code 9" not in str(error):
            raise
        return True
    return False


def test_killed_at_any_call_of_a_save_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    for call in itertools.count():
        root = tmp_path / str(call)
        CheckpointStore(root, keep=1).save(1, {"weight": torch.full((6,), 1.0)}, {"step": 1})
        died = _dies(root, call)
        store = CheckpointStore(root, keep=1)
        path = store.newest()
        assert path is not None
        loaded = {"weight": torch.zeros(6)}
        step = store.load(path, loaded)["step"]
        assert step in (1, 2)
        assert loaded["weight"].tolist() == [step] * 6
        store.save(3, loaded, {})
        assert _names(root) == ["latest", "step_00000003"]
        if not died:
            break
    assert call > 10, "the calls of a save were not met"
