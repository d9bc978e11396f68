from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bert.data.indexed_dataset import (
    DatasetInfo,
    SourceFile,
    check_counts,
    check_tokenizer,
    open_dataset,
    open_word_starts,
    read_dataset_info,
    write_dataset_info,
)
from megatron_bert.errors import DataError
from tests.core.support import write_documents

INFO = DatasetInfo(
    tokenizer_hash="ab" * 32,
    tokenizer_name="日本語.model",
    vocab_size=99,
    documents=3,
    tokens=70,
    sources=(SourceFile("a.jsonl", 12), SourceFile("b.txt.gz", 8, "cd" * 32)),
    skipped_lines=1,
)


def test_a_sidecar_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_dataset_info(tmp_path / "set.v1", INFO)
    assert read_dataset_info(tmp_path / "set.v1") == INFO
    assert [path.name for path in tmp_path.iterdir()] == ["set.v1.json"]


def test_a_dataset_without_sidecar_has_no_info(tmp_path: Path) -> None:
    assert read_dataset_info(tmp_path / "set") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 99}',
        json.dumps({"version": 1, "tokenizer_hash": 5}),
        json.dumps({"version": 1, "tokenizer_hash": "ab", "vocab_size": "99"}),
        json.dumps({"version": 1, "tokenizer_hash": "ab", "sources": [], "surprise": 1}),
    ],
)
def test_a_sidecar_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(DataError, match=r"set\.json does not describe a dataset"):
        read_dataset_info(tmp_path / "set")


def test_a_sidecar_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot write"):
        write_dataset_info(tmp_path / "absent" / "set", INFO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named_with_the_tool_that_makes_it(tmp_path: Path, suffix: str) -> None:
    write_documents(tmp_path / "set", [[1]])
    (tmp_path / f"set{suffix}").unlink()
    with pytest.raises(DataError, match=rf"no file .*set\{suffix}.*tools/preprocess_data\.py"):
        open_dataset(tmp_path / "set")


def test_a_prefix_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be used: .*too long"):
        open_dataset(tmp_path / ("a" * 300))


def test_a_damaged_dataset_is_a_data_error_that_says_what_is_wrong(tmp_path: Path) -> None:
    write_documents(tmp_path / "set", [[1, 2, 3]])
    with (tmp_path / "set.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=r"set cannot be used: .*set\.idx: .*grown"):
        open_dataset(tmp_path / "set")


def test_files_that_are_not_a_datasets_are_refused_with_the_callers_remedy(tmp_path: Path) -> None:
    prefix = tmp_path / "set.v1"
    write_documents(prefix, [[1, 2], [3]])
    dataset = open_dataset(prefix)
    assert open_word_starts(prefix, 3, remedy="pray") is None
    (tmp_path / "set.v1.words").write_bytes(bytes(2))
    with pytest.raises(DataError, match=r"set\.v1\.words: 2 bytes, expected 1.*; pray$"):
        open_word_starts(prefix, 3, remedy="pray")
    check_counts(prefix, replace(INFO, documents=2, tokens=3), dataset, remedy="pray")
    with pytest.raises(
        DataError, match=r"json tells of 3 documents and 70 tokens.*of 2 and 3.*pray$"
    ):
        check_counts(prefix, INFO, dataset, remedy="pray")
    check_tokenizer(prefix, INFO, "b.model", "ab" * 32, remedy="pray")
    with pytest.raises(
        DataError, match=r"made with tokenizer 日本語\.model .* but b\.model has cd; pray$"
    ):
        check_tokenizer(prefix, INFO, "b.model", "cd", remedy="pray")
