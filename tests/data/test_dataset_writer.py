from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.config.errors import DataError
from megatron_bert.data.dataset_writer import DatasetWriter
from megatron_bert.data.indexed_dataset import DatasetInfo, open_dataset
from megatron_bert.data.partial_work import PartialWork
from tests.core.support import write_documents

INFO = DatasetInfo("ab" * 32, "a.model", 99, documents=3, tokens=4, sources=())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_writer(prefix: Path, vocab_size: int = 99, **options: Any) -> DatasetWriter:
    return DatasetWriter(prefix, vocab_size, identity={"for": "a test"}, **options)


def add(writer: DatasetWriter, *documents: list[int]) -> None:
    tokens = np.array([token for document in documents for token in document], dtype=np.int32)
    writer.add_documents(tokens, np.array([len(document) for document in documents]))


@pytest.mark.parametrize(("vocab_size", "token_bytes"), [(65_499, 2), (65_500, 4)])
def test_a_finished_dataset_has_the_bytes_that_the_format_describes(
    tmp_path: Path, vocab_size: int, token_bytes: int
) -> None:
    with make_writer(tmp_path / "set", vocab_size) as writer:
        add(writer, [1, 2], [65_498])
        add(writer, [3])
        assert names(tmp_path) == ["set.partial"]
        writer.finish({}, INFO)
    assert names(tmp_path) == ["set.bin", "set.idx", "set.json"]
    write_documents(tmp_path / "expected", [[1, 2], [65_498], [3]], token_bytes)
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"expected{suffix}").read_bytes()
        assert (tmp_path / f"set{suffix}").read_bytes() == expected


def test_a_writer_goes_on_from_the_last_commit_of_the_one_before(tmp_path: Path) -> None:
    with make_writer(tmp_path / "set") as writer:
        assert writer.note is None
        add(writer, [1, 2])
        writer.append("more", np.array([7, 8], dtype=np.uint64))
        writer.commit({"done": 1})
        add(writer, [5, 6, 7])
        writer.append("never committed", np.array([9]))
    with make_writer(tmp_path / "set") as writer:
        assert writer.note == {"done": 1}
        assert writer.read("more", np.uint64).tolist() == [7, 8]
        assert writer.read("never committed", np.uint64).tolist() == []
        add(writer, [3])
        writer.finish({}, INFO)
    dataset = open_dataset(tmp_path / "set")
    assert [dataset.document(number).tolist() for number in range(2)] == [[1, 2], [3]]


def test_a_writer_dropped_before_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with make_writer(tmp_path / "set") as writer:
        add(writer, [1, 2])
    assert names(tmp_path) == []


def test_a_refused_restart_keeps_the_earlier_work(tmp_path: Path) -> None:
    with make_writer(tmp_path / "set") as writer:
        add(writer, [1, 2])
        writer.commit({"done": 1})
    write_documents(tmp_path / "set", [[9]])
    with pytest.raises(DataError, match="already there"):
        make_writer(tmp_path / "set", restart=True)
    with make_writer(tmp_path / "set", overwrite=True) as writer:
        assert writer.note == {"done": 1}


def test_letting_go_of_a_removed_folder_leaves_a_new_one_of_that_name_alone(
    tmp_path: Path,
) -> None:
    with PartialWork(tmp_path / "work", {}, restart=False) as work:
        work.remove()
        (tmp_path / "work").mkdir()
    assert (tmp_path / "work").is_dir()
