"""Writing `.words` files: a bit for each token of a dataset; csrc/word_starts.h describes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_bert.config.arithmetic import ceil_div

_BITS_AT_A_TIME = 1 << 23


def write_joined_word_starts(path: Path, parts: Iterable[tuple[Path, int]]) -> None:
    """Join the bits of several files, which may end within a byte, in bounded memory.

    Args:
        path: the file, which is replaced; give a temporary name and rename it.
        parts: each file, and the number of tokens that it has bits for.

    Raises:
        OSError: a file cannot be read or written.
        RuntimeError: a file ends before its last bit.
    """
    carried = np.empty(0, dtype=np.uint8)
    with path.open("wb") as target:
        for part, num_tokens in parts:
            for bits in _pieces(part, num_tokens):
                bits = np.concatenate([carried, bits])
                whole = len(bits) // 8 * 8
                target.write(np.packbits(bits[:whole], bitorder="little").data)
                carried = bits[whole:]
        target.write(np.packbits(carried, bitorder="little").data)


def _pieces(path: Path, num_tokens: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield one number (0 or 1) per token, in chunks."""
    left = num_tokens
    with path.open("rb") as source:
        while left:
            count = min(left, _BITS_AT_A_TIME)
            num_bytes = ceil_div(count, 8)
            content = np.frombuffer(source.read(num_bytes), dtype=np.uint8)
            if len(content) < num_bytes:
                raise RuntimeError(
                    f"{path}: has not a bit for each of {num_tokens:,} tokens: it was truncated "
                    f"while in use"
                )
            yield np.unpackbits(content, count=count, bitorder="little")
            left -= count
