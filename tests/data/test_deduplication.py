from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from _megatron_bert_core import HashSet
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_bert.data.deduplication import Deduplicator, hash_texts

# Few words, so that hashes are equal, share a word, or are zero.
WORDS = st.sampled_from([0, 1, 2, 2**63, 2**64 - 1])
HASHES = st.lists(st.tuples(WORDS, WORDS), max_size=40)


def as_array(hashes: list[tuple[int, int]]) -> NDArray[np.uint64]:
    return np.array(hashes, dtype=np.uint64).reshape(-1, 2)


def random_hashes(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.text(alphabet="ab猫", max_size=3), max_size=30), max_size=5))
def test_texts_are_new_as_a_python_set_says(batches: list[list[str]]) -> None:
    deduplicator = Deduplicator()
    seen: set[str] = set()
    for batch in batches:
        expected = []
        for text in batch:
            expected.append(text not in seen)
            seen.add(text)
        assert deduplicator.filter_hashes(hash_texts(batch)).tolist() == expected


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(HASHES, max_size=5), HASHES)
def test_hashes_of_any_bits_are_new_as_a_python_set_says(
    batches: list[list[tuple[int, int]]], restored: list[tuple[int, int]]
) -> None:
    deduplicator = Deduplicator()
    deduplicator.restore(as_array(restored))
    seen = set(restored)
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in seen)
            seen.add(value)
        assert deduplicator.filter_hashes(as_array(batch)).tolist() == expected


def test_a_set_that_grows_many_times_forgets_nothing() -> None:
    hashes = random_hashes(300_000)
    deduplicator = Deduplicator()
    for part in np.array_split(hashes, 77):
        assert deduplicator.filter_hashes(np.ascontiguousarray(part)).all()
    assert not deduplicator.filter_hashes(hashes[::-1].copy()).any()


@pytest.mark.parametrize("count", [50_000, 70_000, 100_000, 140_000, 200_000, 1_000_000])
def test_a_hash_takes_at_most_24_bytes(count: int) -> None:
    hashes = HashSet()
    hashes.insert(random_hashes(count))
    assert 18 * count < hashes.memory_bytes < 24 * count


def test_another_job_goes_on_from_the_hashes_that_were_new() -> None:
    first = Deduplicator()
    batches = [hash_texts(["a", "b", "a"]), hash_texts(["b", "c"])]
    journal = np.concatenate([hashes[first.filter_hashes(hashes)] for hashes in batches])
    np.testing.assert_array_equal(journal, hash_texts(["a", "b", "c"]))
    second = Deduplicator()
    second.restore(journal)
    assert second.filter_hashes(hash_texts(["a", "b", "c", "d"])).tolist() == [
        False,
        False,
        False,
        True,
    ]


def test_a_hash_is_the_xxh3_of_the_text_as_utf8_on_any_machine() -> None:
    high, low = map(int, hash_texts(["猫"])[0])
    assert high << 64 | low == xxhash.xxh3_128_intdigest("猫".encode())
    assert hash_texts(["猫"]).dtype == np.uint64
    assert hash_texts([]).shape == (0, 2)


def test_threads_find_each_hash_new_once() -> None:
    hashes = random_hashes(50_000)
    deduplicator = Deduplicator()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(deduplicator.filter_hashes, [hashes] * 4))
    assert np.array(found).sum(axis=0).tolist() == [1] * len(hashes)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 2)])
def test_hashes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hashes must have the shape \[n, 2\]"):
        Deduplicator().restore(np.zeros(shape, dtype=np.uint64))
