from __future__ import annotations

import errno
import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_bert.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.checkpoint.tensors import read_whole_tensors, saved_shapes
from megatron_bert.errors import CheckpointError
from tests.checkpoint.sharded_state import assert_same_bits, blank, sharded, whole_state
from tests.distributed_harness import run_ranks


def _save_two_steps(root: Path) -> list[Path]:
    store = CheckpointStore(root, keep=3)
    return [store.save(step, sharded(whole_state(step), 1), {"step": step}) for step in (10, 20)]


def _load_newest(root: Path) -> tuple[str, dict[str, object], list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_bert").addHandler(handler)
    store = CheckpointStore(root, keep=3)
    path = store.newest()
    assert path is not None
    tensors = sharded(blank(whole_state()), 1)
    state = store.load(path, tensors)
    assert_same_bits(tensors, whole_state(int(path.name.removeprefix("step_"))))
    return path.name, dict(state), messages


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two") / "checkpoints"
    run_ranks(2, _save_two_steps, root)
    return root


@pytest.fixture
def root(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def _shard(root: Path, step: int = 20, index: int = 2) -> Path:
    return next((root / f"step_{step:08d}").glob(f"shard-{index:05d}-*.safetensors"))


def _truncate(root: Path) -> str:
    path = _shard(root)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    return f"{path}: size is {size - 5} bytes instead of {size}"


def _flip_a_bit(root: Path) -> str:
    path = _shard(root)
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)
    return f"{path}: checksum is "


def _zero_the_end(root: Path) -> str:
    path = _shard(root)
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))
    return f"{path}: checksum is "


def _lose_a_shard(root: Path) -> str:
    path = _shard(root)
    path.unlink()
    return f"{path}: missing"


def _mix_in_a_shard_of_another_step(root: Path) -> str:
    path = _shard(root)
    shutil.copy(_shard(root, step=10), path)
    return f"{path}: "


def _add_a_shard(root: Path) -> str:
    path = _shard(root).with_name("shard-00009-model-00001-of-00001.safetensors")
    shutil.copy(_shard(root), path)
    return f"{path}: not of this checkpoint"


def _lose_the_manifest(root: Path) -> str:
    path = root / "step_00000020" / MANIFEST_NAME
    path.unlink()
    return f"{path}: missing"


def _cut_the_manifest(root: Path) -> str:
    path = root / "step_00000020" / MANIFEST_NAME
    path.write_text(path.read_text()[:-10])
    return f"{path}: not a manifest"


def _alter_the_state(root: Path) -> str:
    path = root / "step_00000020" / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["state"]["step"] = 21
    path.write_text(json.dumps(content))
    return f"{path}: altered"


def _take_a_foreign_manifest(root: Path) -> str:
    path = root / "step_00000020" / MANIFEST_NAME
    path.write_text("[1, 2]")
    return f"{path}: not a manifest"


DAMAGES = [
    _truncate,
    _flip_a_bit,
    _zero_the_end,
    _lose_a_shard,
    _mix_in_a_shard_of_another_step,
    _add_a_shard,
    _lose_the_manifest,
    _cut_the_manifest,
    _alter_the_state,
    _take_a_foreign_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    root: Path, damage: Callable[[Path], str]
) -> None:
    what = damage(root)
    for rank, (name, state, messages) in enumerate(run_ranks(2, _load_newest, root)):
        assert name == "step_00000010"
        assert state == {"step": 10}
        if rank == 0:
            assert len(messages) == 1
            assert what in messages[0]
        else:
            assert messages == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_loading_a_damaged_checkpoint_by_its_path_is_refused(
    root: Path, damage: Callable[[Path], str]
) -> None:
    what = damage(root)
    tensors = blank(whole_state())
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(root, keep=3).load(root / "step_00000020", tensors)
    assert what in str(caught.value)
    assert_same_bits(tensors, blank(whole_state()))


def test_what_the_host_cannot_read_at_the_moment_is_not_passed_over_as_damaged(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Manifest, "verify_content", refuse)
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(root, keep=3).newest()
    assert "step_00000020 cannot be read, though it may be intact" in str(caught.value)
    assert "Stale file handle" in str(caught.value)


def test_undamaged_the_newest_is_taken_without_a_warning(root: Path) -> None:
    assert run_ranks(2, _load_newest, root)[0] == ("step_00000020", {"step": 20}, [])


def test_when_every_checkpoint_is_damaged_all_are_named(root: Path) -> None:
    texts = [_truncate(root), f"{_shard(root, step=10)}: missing"]
    _shard(root, step=10).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is intact") as caught:
        CheckpointStore(root, keep=3).newest()
    assert all(text in str(caught.value) for text in texts)


def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_00000099: no such folder"):
        CheckpointStore(tmp_path, keep=1).load(tmp_path / "step_00000099", {})


class _Canary:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (Path("canary"),))


def test_a_pickle_in_the_folder_is_never_opened(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = root / "step_00000020"
    for name in (".metadata", "__0_0.distcp", "state.pt"):
        (folder / name).write_bytes(pickle.dumps(_Canary()))
    store = CheckpointStore(root, keep=3)
    assert store.newest() == folder
    store.load(folder, blank(whole_state()))
    assert not Path("canary").exists()


def _load_error(root: Path, tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(root, keep=3).load(root / "step_00000020", tensors)
    return str(caught.value)


def test_missing_and_unexpected_tensors_are_named_with_the_remedy(root: Path) -> None:
    tensors = blank(whole_state())
    tensors["model.new.weight"] = tensors.pop("model.both.weight")
    message = _load_error(root, tensors)
    assert "not in the checkpoint: model.new.weight" in message
    assert "only in the checkpoint: model.both.weight" in message
    assert "manifest.json" in message


def test_another_shape_or_type_is_named_with_both(root: Path) -> None:
    tensors = blank(whole_state())
    tensors["model.both.weight"] = torch.zeros(8, 4)
    tensors["model.grid.weight"] = torch.zeros(5, 8)
    message = _load_error(root, tensors)
    assert "model.both.weight (checkpoint [8, 3] float32, model [8, 4] float32)" in message
    assert "model.grid.weight (checkpoint [5, 8] bfloat16, model [5, 8] float32)" in message


def test_long_lists_of_names_are_cut(root: Path) -> None:
    tensors = blank(whole_state()) | {f"extra.{i}": torch.zeros(1) for i in range(8)}
    assert "extra.4 and 3 more" in _load_error(root, tensors)


def test_a_tensor_with_a_piece_missing_is_refused(root: Path) -> None:
    # The manifest is made to agree, as if the writer had lost the piece.
    folder = root / "step_00000020"
    manifest = Manifest.read(folder)
    lost = _shard(root, index=1)
    lost.unlink()
    files = {name: record for name, record in manifest.files.items() if name != lost.name}
    Manifest(manifest.step, files, manifest.state).write(folder)
    assert "incomplete in the checkpoint: " in _load_error(root, blank(whole_state()))


@pytest.mark.parametrize(
    ("name", "shape"), [("absent", (3,)), (next(iter(whole_state())), (1, 1, 1, 1))]
)
def test_whole_tensors_that_are_not_there_as_asked_for_are_refused(
    root: Path, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError, match=f"not in the checkpoint as asked for: {name};"):
        next(read_whole_tensors(root / "step_00000020", {name: shape}))


def test_shards_that_vanish_while_whole_tensors_are_read_are_named(root: Path) -> None:
    folder = root / "step_00000020"
    tensors = read_whole_tensors(folder, saved_shapes(folder))
    next(tensors)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"\.safetensors: cannot be read: .*check the disk"):
        list(tensors)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0not json"], ids=["empty", "size", "json"]
)
def test_shards_whose_header_cannot_be_read_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"cannot read the shards in {re.escape(str(tmp_path))}"
    ):
        saved_shapes(tmp_path)
