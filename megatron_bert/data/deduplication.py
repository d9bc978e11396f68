"""Duplicate documents, recognised by a hash of their text or of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash
from _megatron_bert_core import HashSet, IndexedDataset

# Restored hashes may be mapped from a file that is larger than the memory to spare.
_RESTORED_AT_A_TIME = 1 << 20


def hash_texts(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """128-bit hashes (XXH3) of texts as UTF-8, `[n, 2]`: the high and the low word of each.

    The probability that any two of 200 million different texts collide is 6e-23. May be called
    from several threads at once.
    """
    return _words_of([xxhash.xxh3_128_digest(text.encode()) for text in texts])


def hash_documents(dataset: IndexedDataset, numbers: Iterable[int]) -> npt.NDArray[np.uint64]:
    """The same hashes of documents' token ids, `[n, 2]`; 2 and 4 bytes a token give equal ones."""
    return _words_of([xxhash.xxh3_128_digest(dataset.document(number).data) for number in numbers])


def _words_of(digests: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)


class Deduplicator:
    """Tells which documents are seen for the first time, in 19 to 24 bytes a distinct document.

    The order of the calls decides which of several equal documents counts as the first, so one
    thread should make them all; `hash_texts`, the costly part, may run in any thread.
    """

    def __init__(self) -> None:
        self._seen = HashSet()

    def filter_hashes(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Tell, `[n]`, which of the hashes, `[n, 2]`, are new in this call and all earlier ones."""
        return self._seen.insert(hashes)

    def restore(self, hashes: npt.NDArray[np.uint64]) -> None:
        """Mark as seen the documents whose hashes, `[n, 2]`, were new to an earlier job."""
        for begin in range(0, len(hashes), _RESTORED_AT_A_TIME):
            self._seen.insert(hashes[begin : begin + _RESTORED_AT_A_TIME])
