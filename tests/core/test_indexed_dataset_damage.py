from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _megatron_bert_core import IndexedDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.data.indexed_dataset import open_dataset
from megatron_bert.errors import DataError
from tests.core.support import index_bytes

LENGTHS, BOUNDARIES = [3, 1, 2], [0, 1, 3]
TOKENS = np.arange(6, dtype=np.int32).tobytes()


def write(folder: Path, index: bytes, tokens: bytes = TOKENS) -> str:
    (folder / "set.idx").write_bytes(index)
    (folder / "set.bin").write_bytes(tokens)
    return str(folder / "set")


def test_the_undamaged_dataset_opens(tmp_path: Path) -> None:
    assert IndexedDataset(write(tmp_path, index_bytes(LENGTHS, BOUNDARIES))).num_tokens == 6


DAMAGED = {
    "empty": (b"", "not an indexed dataset"),
    "a bare header": (b"MMIDIDX\0\0", "not an indexed dataset"),
    "other magic": (
        index_bytes(LENGTHS, BOUNDARIES, magic=b"MMIDIDX\0\1"),
        "not an indexed dataset",
    ),
    "other version": (index_bytes(LENGTHS, BOUNDARIES, version=2), "version 2"),
    "a byte short": (index_bytes(LENGTHS, BOUNDARIES)[:-1], "truncated"),
    "a byte long": (index_bytes(LENGTHS, BOUNDARIES) + b"\0", "1 bytes more"),
    "multimodal": (index_bytes(LENGTHS, BOUNDARIES) + b"\0\1\0", "multimodal"),
    "huge N": (index_bytes(LENGTHS, BOUNDARIES, counts=(2**64 - 1, 3)), "truncated"),
    "N that wraps around": (index_bytes(LENGTHS, BOUNDARIES, counts=(2**62, 3)), "truncated"),
    "huge D": (index_bytes(LENGTHS, BOUNDARIES, counts=(3, 2**61 + 3)), "truncated"),
    "no boundaries": (index_bytes([], []), "no document boundaries"),
    "negative length": (
        index_bytes([3, -1, 4], BOUNDARIES, offsets=[0, 12, 8]),
        "sequence 1 has length -1",
    ),
    "sequence beyond .bin": (index_bytes([3, 1, 3], BOUNDARIES), "sequence 2 ends beyond"),
    "longest sequence": (index_bytes([2**31 - 1, 1, 2], BOUNDARIES), "sequence 0 ends beyond"),
    "fewer tokens than .bin": (index_bytes([3, 1, 1], BOUNDARIES), "grown"),
    "odd offset": (
        index_bytes(LENGTHS, BOUNDARIES, offsets=[0, 11, 16]),
        "sequence 1 starts at byte 11 .* the one before ends at byte 12 .*contiguous",
    ),
    "overlapping sequences": (
        index_bytes(LENGTHS, BOUNDARIES, offsets=[0, 8, 16]),
        "sequence 1 starts at byte 8",
    ),
    "offset far away": (
        index_bytes(LENGTHS, BOUNDARIES, offsets=[0, 12, 2**63 - 4]),
        "starts at byte",
    ),
    "negative offset": (index_bytes(LENGTHS, BOUNDARIES, offsets=[-4, 12, 16]), "byte -4"),
    "first boundary": (index_bytes(LENGTHS, [1, 1, 3]), "boundaries run from 1"),
    "last boundary": (index_bytes(LENGTHS, [0, 1, 2]), "boundaries run from 0 to 2"),
    "falling boundaries": (index_bytes(LENGTHS, [0, 2, 1, 3]), "document boundary 2"),
    "boundary beyond": (index_bytes(LENGTHS, [0, 2**63 - 1, 3]), "document boundary 1"),
    "negative boundary": (index_bytes(LENGTHS, [0, -(2**63), 3]), "document boundary 1"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_index_is_refused_with_its_name_and_the_damage(
    tmp_path: Path, damage: str
) -> None:
    index, message = DAMAGED[damage]
    prefix = write(tmp_path, index)
    for mmap in (True, False):
        with pytest.raises(RuntimeError, match=rf"set\.idx: .*{message}"):
            IndexedDataset(prefix, mmap=mmap)
    remedy = r"; copy it again, or make it anew with tools/preprocess_data\.py"
    with pytest.raises(DataError, match=rf"dataset .*set cannot be used: .*{message}.*{remedy}"):
        open_dataset(prefix)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0, "unknown"),
        (1, "uint8"),
        (2, "int8"),
        (3, "int16"),
        (5, "int64"),
        (6, "float64"),
        (7, "float32"),
        (9, "unknown"),
        (255, "unknown"),
    ],
)
def test_tokens_of_a_type_that_is_not_texts_are_refused_by_its_name(
    tmp_path: Path, code: int, name: str
) -> None:
    prefix = write(tmp_path, index_bytes(LENGTHS, BOUNDARIES, type_code=code))
    with pytest.raises(RuntimeError, match=rf"set\.idx: token type code {code} \({name}\)"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("tokens", "message"), [(TOKENS[:-4], "truncated"), (TOKENS + b"\0", "grown"), (b"", "beyond")]
)
def test_tokens_of_another_size_are_refused(tmp_path: Path, tokens: bytes, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        IndexedDataset(write(tmp_path, index_bytes(LENGTHS, BOUNDARIES), tokens))


def test_the_index_of_another_set_is_refused_on_either_side(tmp_path: Path) -> None:
    longer, shorter = index_bytes([4, 1, 2], BOUNDARIES), index_bytes([3, 1], [0, 2])
    with pytest.raises(RuntimeError, match=r"beyond the 24 bytes of the \.bin .*another set"):
        IndexedDataset(write(tmp_path, longer))
    with pytest.raises(RuntimeError, match=r"describes 16 bytes .* has 24 .*another set"):
        IndexedDataset(write(tmp_path, shorter))


def test_an_index_that_takes_the_tokens_for_wider_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="beyond the 24 bytes"):
        IndexedDataset(write(tmp_path, index_bytes([6, 3, 3], BOUNDARIES, 4)))
    with pytest.raises(RuntimeError, match=r"describes 12 bytes of tokens, but the \.bin has 24"):
        IndexedDataset(write(tmp_path, index_bytes(LENGTHS, BOUNDARIES, 2)))


@pytest.mark.parametrize("missing", [".idx", ".bin"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    prefix = write(tmp_path, index_bytes(LENGTHS, BOUNDARIES))
    Path(prefix + missing).unlink()
    with pytest.raises(RuntimeError, match=rf"set\{missing}"):
        IndexedDataset(prefix)


def test_an_index_with_any_bytes_changed_is_refused_or_read_within_bounds(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole = index_bytes(LENGTHS, BOUNDARIES)
    folder = tmp_path_factory.mktemp("damage")

    @settings(max_examples=300, derandomize=True, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4),
        st.integers(0, len(whole)),
    )
    def check(changes: list[tuple[int, int]], size: int) -> None:
        index = bytearray(whole)
        for place, value in changes:
            index[place] = value
        try:
            dataset = IndexedDataset(write(folder, bytes(index[: size or None])))
        except RuntimeError:
            return
        documents = [dataset.document(number) for number in range(dataset.num_documents)]
        assert np.concatenate(documents).tobytes()[: len(TOKENS)] == TOKENS

    check()
