from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from _megatron_bert_core import IndexedDataset, IndexedDatasetWriter
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


def test_documents_given_together_are_the_documents_given_one_by_one(tmp_path: Path) -> None:
    documents = [np.arange(length, dtype=np.int32) for length in (4, 0, 700_000, 1)]
    write_documents(tmp_path / "single", documents)
    writer = IndexedDatasetWriter(str(tmp_path / "joined"), 4)
    writer.add_documents(np.concatenate(documents), np.array([4, 0, 700_000, 1]))
    writer.close()
    for suffix in (".bin", ".idx"):
        single = (tmp_path / f"single{suffix}").read_bytes()
        assert (tmp_path / f"joined{suffix}").read_bytes() == single


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


def test_nothing_has_its_name_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(str(tmp_path / "set"), 4)
    writer.add_document(np.array([1, 2], dtype=np.int32))
    assert not (tmp_path / "set.bin").exists()
    assert not (tmp_path / "set.idx").exists()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.idx"]


def test_a_writer_dropped_before_it_is_closed_leaves_nothing(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(str(tmp_path / "set"), 4)
    writer.add_document(np.array([1, 2], dtype=np.int32))
    del writer
    assert list(tmp_path.iterdir()) == []


def test_a_finished_dataset_has_its_name_only_when_it_is_closed(tmp_path: Path) -> None:
    write_documents(tmp_path / "set", [[9]])
    writer = IndexedDatasetWriter(str(tmp_path / "set"), 4)
    writer.add_document(np.array([1, 2], dtype=np.int32))
    writer.finish()
    assert contents(IndexedDataset(str(tmp_path / "set"))) == [[9]]
    for more in (writer.finish, lambda: writer.add_document(np.array([1], dtype=np.int32))):
        with pytest.raises(ValueError, match="closed"):
            more()
    writer.close()
    assert contents(IndexedDataset(str(tmp_path / "set"))) == [[1, 2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.idx"]


def test_a_writer_that_the_disk_failed_never_names_its_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    writer = IndexedDatasetWriter(str(tmp_path / "set"), 4)
    writer.add_document(np.zeros(5000, dtype=np.int32))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"cannot write .*set\.bin"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(ValueError, match="closed"):
        writer.close()
    del writer
    assert list(tmp_path.iterdir()) == []


def test_a_closed_writer_takes_nothing_more(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(str(tmp_path / "set"), 4)
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.add_document(np.array([1], dtype=np.int32))
    with pytest.raises(ValueError, match="closed"):
        writer.close()


@pytest.mark.parametrize(("token_bytes", "token"), [(2, 65536), (2, -1), (4, -1)])
def test_an_id_that_does_not_fit_is_refused_without_a_trace(
    tmp_path: Path, token_bytes: int, token: int
) -> None:
    writer = IndexedDatasetWriter(str(tmp_path / "set"), token_bytes)
    with pytest.raises(ValueError, match=str(token)):
        writer.add_document(np.array([1, token], dtype=np.int32))
    writer.add_document(np.array([3], dtype=np.int32))
    writer.close()
    assert contents(IndexedDataset(str(tmp_path / "set"))) == [[3]]


@pytest.mark.parametrize("lengths", [[2], [2, 2], [4, -1], [2**62, 2**62]])
def test_lengths_that_are_not_those_of_the_tokens_are_refused(
    tmp_path: Path, lengths: list[int]
) -> None:
    writer = IndexedDatasetWriter(str(tmp_path / "set"), 4)
    with pytest.raises(ValueError, match="document lengths"):
        writer.add_documents(np.arange(3, dtype=np.int32), np.array(lengths))


def test_tokens_of_another_type_are_refused(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(str(tmp_path / "set"), 4)
    with pytest.raises(TypeError):
        writer.add_document(np.array([1], dtype=np.int64))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="absent"):
        IndexedDatasetWriter(str(tmp_path / "absent" / "set"), 4)
