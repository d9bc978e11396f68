"""Writing `.idx` files of Megatron-LM's format; csrc/indexed_dataset.h draws their layout."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_TYPE_CODES = {2: 8, 4: 4}
# Offsets are made piece by piece, so that they never stand in memory as a whole.
_SEQUENCES_AT_A_TIME = 1 << 20


def write_index(
    path: Path,
    token_bytes: int,
    lengths_N: npt.NDArray[np.int32],
    boundaries_D: npt.NDArray[np.int64] | None = None,
) -> None:
    """Write the index of a `.bin` in which N sequences stand one after the other.

    Args:
        path: the file, which is replaced; give a temporary name and rename it.
        token_bytes: 2 (uint16) or 4 (int32).
        lengths_N: tokens of each sequence.
        boundaries_D: where documents begin, as sequence numbers, and at last N. Default: every
            sequence is a document.

    Raises:
        OSError: the file cannot be written.
    """
    num_sequences = len(lengths_N)
    num_boundaries = num_sequences + 1 if boundaries_D is None else len(boundaries_D)
    with path.open("wb") as file:
        file.write(_MAGIC + struct.pack("<QB", _VERSION, _TYPE_CODES[token_bytes]))
        file.write(struct.pack("<QQ", num_sequences, num_boundaries))
        lengths_N.astype("<i4").tofile(file)
        end = 0
        for begin in range(0, num_sequences, _SEQUENCES_AT_A_TIME):
            lengths = lengths_N[begin : begin + _SEQUENCES_AT_A_TIME].astype(np.int64)
            ends = np.cumsum(lengths * token_bytes) + end
            (ends - lengths * token_bytes).astype("<i8").tofile(file)
            end = int(ends[-1])
        for begin in range(0, num_boundaries, _SEQUENCES_AT_A_TIME):
            end = min(begin + _SEQUENCES_AT_A_TIME, num_boundaries)
            some = np.arange(begin, end) if boundaries_D is None else boundaries_D[begin:end]
            some.astype("<i8").tofile(file)
