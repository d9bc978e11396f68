"""Safetensors files, written tensor after tensor.

The format (https://huggingface.co/docs/safetensors) is a JSON header, which names type, shape and
place of every tensor, and then their bytes. `safetensors.torch.save` would make the whole file in
memory first, and DCP's writer holds it thrice; here a file costs a copy of one tensor at most, and
none where tensors lie contiguous in the host's memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_bert.checkpoint.manifest import TENSOR_SUFFIX, FileRecord
from megatron_bert.files import new_file

# A chunk is hashed and written while it is in the CPU's cache. It is small because a thread may
# hold the GIL while it hashes (xxhash before 3.5).
_CHUNK_BYTES = 1 << 22
_HEADER_ALIGNMENT = 8
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Piece:
    """A part of a whole tensor, on its way to a file.

    Attributes:
        name: Name of the whole tensor.
        dtype: Dtype of its elements.
        shape: Shape of the piece.
        offsets: Where the piece begins in the whole tensor, in each dimension.
        resolve: Returns the piece, on any device, as one tensor or as several that are stacked
            along the first dimension; called when its turn to be written comes. Several are never
            in memory together if they are made one by one.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    resolve: Callable[[], Iterable[torch.Tensor]]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter(HuggingFaceStorageWriter):
    """Writes what DCP planned for this rank, in files that DCP's reader and safetensors read.

    Args:
        folder: Where the files go.
        max_file_bytes: A file ends before a tensor that would make it larger; one larger tensor
            has a file of its own.
        check: Called between any two writes; what it raises ends the writing.

    Attributes:
        records: Size and checksum of every file written, by name.
    """

    def __init__(self, folder: Path, max_file_bytes: int, check: Callable[[], None]) -> None:
        super().__init__(path=str(folder), save_distributed=True)
        self.records: dict[str, FileRecord] = {}
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._check = check

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of `plan`; DCP asks for a future, which is already done when returned."""
        pieces = [_piece(item, planner) for item in plan.items]
        shard = plan.storage_data["shard_index"]
        self.records |= write_shard(self._folder, shard, pieces, self._max_file_bytes, self._check)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def write_shard(
    folder: Path,
    shard: int,
    pieces: Sequence[Piece],
    max_file_bytes: int,
    check: Callable[[], None],
) -> dict[str, FileRecord]:
    """Write what one rank holds into files of at most `max_file_bytes`; return their records.

    Args:
        folder: Where the files go.
        shard: 1-based number of the rank's shard.
        pieces: The tensors, in the order of the files.
        max_file_bytes: See `ShardWriter`.
        check: See `write_file`.

    Raises:
        OSError: The host could not write.
    """
    records: dict[str, FileRecord] = {}
    files = list(split_by_size(pieces, max_file_bytes))
    for number, of_file in enumerate(files, start=1):
        name = f"shard-{shard:05d}-model-{number:05d}-of-{len(files):05d}{TENSOR_SUFFIX}"
        records[name] = write_file(folder / name, of_file, check)
    return records


def split_by_size(pieces: Sequence[Piece], max_bytes: int) -> Iterator[list[Piece]]:
    """Divide pieces, in their order, into groups of at most `max_bytes` or of one piece."""
    group: list[Piece] = []
    filled = 0
    for piece in pieces:
        if group and filled + piece.size > max_bytes:
            yield group
            group, filled = [], 0
        group.append(piece)
        filled += piece.size
    if group:
        yield group


def write_file(
    path: Path,
    pieces: Sequence[Piece],
    check: Callable[[], None],
    *,
    with_places: bool = True,
) -> FileRecord:
    """Write a safetensors file durably and return its record.

    The checksum is taken from memory on the way out: taken from the file afterwards, it would
    vouch for whatever the storage made of the bytes.

    Args:
        path: The file, which must not exist yet.
        pieces: Its tensors; their names must differ.
        check: Called before every write; what it raises ends the writing.
        with_places: Say in the header where the pieces lie in the whole tensors, for DCP's reader.

    Raises:
        OSError: The host could not write.
    """
    # The widest types first, so that every tensor begins at a multiple of its type's size.
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    digest = xxhash.xxh3_64()
    size = 0
    with new_file(path) as write:
        for data in _chunks(ordered, with_places):
            check()
            digest.update(data)
            write(data)
            size += len(data)
            # A view of the whole tensor, which must be gone before the next one is made.
            del data
    return FileRecord(size, digest.hexdigest())


def _chunks(pieces: Sequence[Piece], with_places: bool) -> Iterator[bytes | memoryview]:
    yield _header(pieces, with_places)
    for piece in pieces:
        written = 0
        for part in piece.resolve():
            data = _bytes_of(part)
            for begin in range(0, len(data), _CHUNK_BYTES):
                yield data[begin : begin + _CHUNK_BYTES]
            written += len(data)
            # Freed before the next one is made, or both would be in memory together.
            del data, part
        assert written == piece.size, piece.name


def _header(pieces: Sequence[Piece], with_places: bool) -> bytes:
    facts = {"format": "pt"}
    if with_places:
        offsets = {piece.name: {"saved_offsets": piece.offsets} for piece in pieces}
        facts |= {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
    entries: dict[str, object] = {"__metadata__": facts}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.size
        entries[piece.name] = {
            "dtype": _TYPE_NAMES[piece.dtype],
            "shape": piece.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(piece: torch.Tensor) -> memoryview:
    return piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _piece(item: WriteItem, planner: SavePlanner) -> Piece:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is no tensor"

    def resolve() -> Iterator[torch.Tensor]:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        yield tensor

    shape, offsets = tuple(data.chunk.sizes), tuple(data.chunk.offsets)
    return Piece(item.index.fqn, data.properties.dtype, shape, offsets, resolve)
