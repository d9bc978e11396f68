"""Documents that were there before, told by a hash of their text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash
from _megatron_bert_core import HashSet


def hash_texts(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """128-bit hashes (XXH3) of texts as UTF-8, `[n, 2]`: the high and the low word of each.

    That two different ones of 200 million texts have the same has a probability of 6e-23. May be
    called from several threads at once.
    """
    digests = b"".join([xxhash.xxh3_128_digest(text.encode()) for text in texts])
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


class Deduplicator:
    """Tells which documents are seen for the first time, in 19 to 24 bytes a different document.

    Which of several equal documents is the first follows from the order of the calls, so one
    thread should make them; `hash_texts`, the costly part, is for any thread.
    """

    def __init__(self) -> None:
        self._seen = HashSet()
        self._new: list[npt.NDArray[np.uint64]] = []

    def filter(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Tell, `[n]`, which texts stand neither in an earlier call nor earlier in this one."""
        return self.filter_hashes(hash_texts(texts))

    def filter_hashes(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """`filter` for texts of which the hashes are given, `[n, 2]`."""
        is_new = self._seen.insert(hashes)
        self._new.append(hashes[is_new])
        return is_new

    def new_hashes(self) -> npt.NDArray[np.uint64]:
        """Hashes, `[n, 2]`, of the documents first seen since the last call, in order.

        They are kept until then: call it now and then, also where nobody wants them.
        """
        new, self._new = self._new, []
        return np.concatenate(new) if new else np.empty((0, 2), dtype=np.uint64)

    def restore(self, hashes: npt.NDArray[np.uint64]) -> None:
        """Take documents for seen whose hashes, `[n, 2]`, `new_hashes` gave in an earlier life."""
        self._seen.insert(hashes)

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the hashes take, without those which `new_hashes` has yet to give."""
        return self._seen.memory_bytes
