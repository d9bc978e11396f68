from __future__ import annotations

import struct
from pathlib import Path

import pytest
from _megatron_bert_core import IndexedDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.support import index_bytes, write_documents, write_sequences


def contents(dataset: IndexedDataset) -> list[list[int]]:
    return [dataset.document(number).tolist() for number in range(dataset.num_documents)]


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_a_written_dataset_is_byte_for_byte_megatrons_format(
    tmp_path: Path, token_bytes: int
) -> None:
    write_documents(tmp_path / "set", [[5, 6, 7], [], [65535]], token_bytes)
    assert (tmp_path / "set.idx").read_bytes() == index_bytes([3, 0, 1], [0, 1, 2, 3], token_bytes)
    code = {2: "H", 4: "i"}[token_bytes]
    assert (tmp_path / "set.bin").read_bytes() == struct.pack(f"<4{code}", 5, 6, 7, 65535)


@pytest.mark.parametrize(("token_bytes", "largest"), [(2, 2**16 - 1), (4, 2**31 - 1)])
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, token_bytes: int, largest: int
) -> None:
    @settings(max_examples=40, derandomize=True, deadline=None)
    @given(st.lists(st.lists(st.integers(0, largest), max_size=20), max_size=20))
    def check(documents: list[list[int]]) -> None:
        dataset = write_documents(tmp_path_factory.mktemp("set") / "set", documents, token_bytes)
        assert contents(dataset) == documents
        assert dataset.document_lengths().tolist() == [len(document) for document in documents]
        assert dataset.num_documents == dataset.num_sequences == len(documents)
        assert dataset.num_tokens == sum(map(len, documents))
        assert dataset.token_bytes == token_bytes
        assert dataset.dtype_code == {2: 8, 4: 4}[token_bytes]
        assert dataset.max_token_id() == max((max(d) for d in documents if d), default=-1)

    check()


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_a_document_of_several_sequences_is_their_tokens_joined(
    tmp_path: Path, token_bytes: int
) -> None:
    sequences = [[1, 2], [3], [], [4, 5, 6], [7], []]
    write_sequences(tmp_path / "set", sequences, [0, 2, 2, 3, 5, 6], token_bytes)
    dataset = IndexedDataset(str(tmp_path / "set"))
    assert contents(dataset) == [[1, 2, 3], [], [], [4, 5, 6, 7], []]
    assert dataset.document_lengths().tolist() == [3, 0, 0, 4, 0]
    assert (dataset.num_documents, dataset.num_sequences, dataset.num_tokens) == (5, 6, 7)


def test_as_many_sequences_as_documents_need_not_be_one_each(tmp_path: Path) -> None:
    write_sequences(tmp_path / "set", [[1, 2], [3], [4]], [0, 2, 2, 3])
    assert contents(IndexedDataset(str(tmp_path / "set"))) == [[1, 2, 3], [], [4]]


def test_an_empty_dataset_is_an_index_of_42_bytes(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "set", [])
    assert (tmp_path / "set.idx").stat().st_size == 42
    assert (dataset.num_documents, dataset.num_tokens, dataset.max_token_id()) == (0, 0, -1)
    assert dataset.document_lengths().shape == (0,)


def test_the_largest_id_is_sought_in_evenly_spaced_documents(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "set", [[number] for number in range(1000)])
    assert dataset.max_token_id(10) == 900
    assert dataset.max_token_id(2000) == 999


def test_a_document_outside_the_dataset_is_an_index_error(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "set", [[1]])
    for number in (-1, 1):
        with pytest.raises(IndexError, match="of 1"):
            dataset.document(number)
