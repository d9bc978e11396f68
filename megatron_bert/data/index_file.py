"""Reading and writing `.idx` files of Megatron-LM's format; csrc/dataset_index.h draws it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_TYPE_CODES = {2: 8, 4: 4}
_HEADER = struct.Struct("<9sQBQQ")
# Arrays are made and copied piece by piece, so that they are never in memory as a whole. They are
# written by `file.write`: `tofile` loses its buffer without an error when the disk is full.
_ITEMS_AT_A_TIME = 1 << 20


class IndexArrays(NamedTuple):
    """What an index says of N consecutive sequences in a `.bin`.

    Attributes:
        lengths_N: tokens of each sequence.
        boundaries_D: the sequence numbers at which documents begin, then N. None: every sequence
            is a document.
    """

    lengths_N: npt.NDArray[np.int32]
    boundaries_D: npt.NDArray[np.int64] | None = None

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.lengths_N if self.boundaries_D is None else self.boundaries_D[1:])


@dataclass(frozen=True)
class MappedIndices:
    """Indices that `open_dataset` has checked, each mapped only when its turn comes.

    A map holds a file descriptor, and there may be more indices than a process may hold of those.

    Attributes:
        paths: the files. Iterating raises OSError for one that cannot be read.
    """

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[IndexArrays]:
        return map(_map_index, self.paths)


def _map_index(path: Path) -> IndexArrays:
    content = np.memmap(path, dtype=np.uint8, mode="r")
    _, _, _, num_sequences, num_boundaries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    lengths_end = _HEADER.size + 4 * num_sequences
    boundaries_begin = lengths_end + 8 * num_sequences
    return IndexArrays(
        content[_HEADER.size : lengths_end].view("<i4"),
        content[boundaries_begin : boundaries_begin + 8 * num_boundaries].view("<i8"),
    )


def write_index(
    path: Path,
    token_bytes: int,
    lengths_N: npt.NDArray[np.int32],
    boundaries_D: npt.NDArray[np.int64] | None = None,
) -> None:
    """Write the index of a `.bin` of N consecutive sequences.

    Args:
        path: the file, which is replaced; give a temporary name and rename it.
        token_bytes: 2 (uint16) or 4 (int32).
        lengths_N: tokens of each sequence.
        boundaries_D: the sequence numbers at which documents begin, then N. Default: every
            sequence is a document.

    Raises:
        OSError: the file cannot be written.
    """
    write_joined_index(path, token_bytes, [IndexArrays(lengths_N, boundaries_D)])


def write_joined_index(path: Path, token_bytes: int, indices: Iterable[IndexArrays]) -> None:
    """Write the index of a `.bin` that joins the `.bin` files of several indices.

    Takes bounded memory.

    Args:
        path: the file, which is replaced; give a temporary name and rename it.
        token_bytes: 2 (uint16) or 4 (int32).
        indices: in order; not an iterator, because they are traversed several times.

    Raises:
        OSError: the file cannot be written.
    """
    num_sequences, num_boundaries = 0, 1
    for index in indices:
        num_sequences += len(index.lengths_N)
        num_boundaries += index.num_documents
    with path.open("wb") as file:
        file.write(
            _HEADER.pack(_MAGIC, _VERSION, _TYPE_CODES[token_bytes], num_sequences, num_boundaries)
        )
        for lengths in _pieces(indices):
            file.write(lengths.astype("<i4").data)
        _write_offsets(file, token_bytes, indices)
        _write_boundaries(file, indices)


def index_size(num_sequences: int, num_documents: int) -> int:
    """Size in bytes of an index with that many sequences and documents."""
    return _HEADER.size + (4 + 8) * num_sequences + 8 * (num_documents + 1)


def _pieces(indices: Iterable[IndexArrays]) -> Iterator[npt.NDArray[np.int32]]:
    for index in indices:
        for begin in range(0, len(index.lengths_N), _ITEMS_AT_A_TIME):
            yield index.lengths_N[begin : begin + _ITEMS_AT_A_TIME]


def _write_offsets(file: BinaryIO, token_bytes: int, indices: Iterable[IndexArrays]) -> None:
    begin = 0
    for lengths in _pieces(indices):
        sizes = lengths.astype(np.int64) * token_bytes
        ends = np.cumsum(sizes) + begin
        file.write((ends - sizes).astype("<i8").data)
        begin = int(ends[-1])


def _write_boundaries(file: BinaryIO, indices: Iterable[IndexArrays]) -> None:
    # Each index's first boundary is the last one of the index before, or 0.
    file.write(struct.pack("<q", 0))
    first_sequence = 0
    for index in indices:
        for begin in range(1, index.num_documents + 1, _ITEMS_AT_A_TIME):
            end = min(begin + _ITEMS_AT_A_TIME, index.num_documents + 1)
            some = (
                np.arange(begin, end)
                if index.boundaries_D is None
                else index.boundaries_D[begin:end]
            )
            file.write((some + first_sequence).astype("<i8").data)
        first_sequence += len(index.lengths_N)
