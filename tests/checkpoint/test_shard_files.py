"""The files are what safetensors and DCP's own reader make of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_bert.checkpoint import shard_files
from megatron_bert.checkpoint.manifest import file_checksum
from megatron_bert.checkpoint.shard_files import Piece, split_by_size, write_file

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "halves": torch.randn(3, 5).bfloat16(),
    "文字": torch.randn(7, 6),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.zeros(0, 4),
    "transposed": torch.randn(4, 3).T,
    "wide": torch.randint(-(2**62), 2**62, (9,)),
}


def _piece(name: str, tensor: torch.Tensor, *offsets: int) -> Piece:
    begins = offsets or (0,) * tensor.dim()
    return Piece(name, tensor.dtype, tuple(tensor.shape), begins, lambda: (tensor,))


def _unchecked() -> None:
    pass


@pytest.mark.parametrize("chunk_bytes", [1 << 22, 7])
def test_every_type_and_shape_is_read_back_by_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(shard_files, "_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "all.safetensors"
    record = write_file(path, [_piece(*entry) for entry in TENSORS.items()], _unchecked)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert (record.size, record.checksum) == (path.stat().st_size, file_checksum(path))


def test_tensors_lie_at_multiples_of_their_types_size(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    write_file(path, [_piece(*entry) for entry in TENSORS.items()], _unchecked)
    content = path.read_bytes()
    for name, tensor in TENSORS.items():
        data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        assert content.index(data) % tensor.itemsize == 0, name


def test_a_piece_may_come_as_parts_which_are_not_held_together(tmp_path: Path) -> None:
    whole = torch.randn(6, 4).bfloat16()
    alive: list[weakref.ref[torch.Tensor]] = []

    def parts() -> Iterator[torch.Tensor]:
        for part in whole.split([1, 3, 2]):
            assert all(earlier() is None for earlier in alive)
            own = part.clone()
            alive.append(weakref.ref(own))
            yield own
            del own

    piece = Piece("whole", whole.dtype, (6, 4), (0, 0), parts)
    path = tmp_path / "file.safetensors"
    write_file(path, [_piece("before", torch.ones(3)), piece], _unchecked)
    assert len(alive) == 3
    assert torch.equal(load_file(path)["whole"], whole)


def test_dcp_joins_pieces_of_several_files(tmp_path: Path) -> None:
    whole = torch.arange(30.0).view(5, 6)
    cuts = {"a": (whole[:2], (0, 0)), "b": (whole[2:, :4], (2, 0)), "c": (whole[2:, 4:], (2, 4))}
    for name, (part, offsets) in cuts.items():
        piece = _piece("whole", part, *offsets)
        write_file(tmp_path / f"{name}.safetensors", [piece], _unchecked)
    loaded = {"whole": torch.zeros(5, 6)}
    with pytest.warns(UserWarning, match="single process"):
        load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(loaded["whole"], whole)


def test_the_format_tells_that_the_tensors_are_pytorchs(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_file(path, [_piece("x", torch.zeros(2))], _unchecked)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([3, 3, 4], [[3, 3, 4]]),
        ([3, 3, 5], [[3, 3], [5]]),
        ([99, 1], [[99], [1]]),
        ([1, 99, 1], [[1], [99], [1]]),
        ([0, 10, 0], [[0, 10, 0]]),
        ([], []),
    ],
)
def test_pieces_are_grouped_up_to_the_largest_size(
    sizes: list[int], groups: list[list[int]]
) -> None:
    pieces = [_piece(str(n), torch.zeros(size, dtype=torch.uint8)) for n, size in enumerate(sizes)]
    found = list(split_by_size(pieces, 10))
    assert [[piece.size for piece in group] for group in found] == groups
    assert [piece.name for group in found for piece in group] == [piece.name for piece in pieces]


def test_a_check_that_fails_ends_the_writing_at_once(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    with pytest.raises(StopError):
        write_file(tmp_path / "x.safetensors", [_piece("x", torch.zeros(2))], stop)
    assert (tmp_path / "x.safetensors").stat().st_size == 0
