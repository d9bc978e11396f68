from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_bert.data.text import DocumentReader, LineError, iterate_documents, parse
from megatron_bert.errors import DataError

TEXTS = ["吾輩は猫である。\n名前はまだ無い。", "", "The fox", "  spaces  "]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def documents(path: Path, json_key: str = "text") -> list[str]:
    return list(iterate_documents(DocumentReader([path], json_key=json_key)))


def fields(path: Path, keys: Sequence[str]) -> list[tuple[str | None, ...]]:
    reader = DocumentReader([path], field_keys=keys)
    return [parse(document, "text", keys).fields for document in reader]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_the_text_column_gives_its_texts_in_order(
    tmp_path: Path, kind: pa.DataType, compression: str
) -> None:
    columns = {"id": [1, 2, 3, 4], "text": pa.array(TEXTS).cast(kind)}
    path = write(tmp_path / "a.parquet", columns, compression=compression, row_group_size=3)
    assert documents(path) == TEXTS


def test_rows_count_from_one_across_row_groups_and_batches(tmp_path: Path) -> None:
    texts = [str(number) for number in range(10_000)]
    path = write(tmp_path / "a.parquet", {"text": texts}, row_group_size=7_000)
    raws = list(DocumentReader([path]))
    assert [raw.data.decode() for raw in raws] == texts
    assert [raw.line for raw in raws] == list(range(1, 10_001))


def test_a_dot_leads_into_structs_unless_a_column_has_the_whole_name(tmp_path: Path) -> None:
    meta = [{"lang": "ja", "deep": {"text": "inner"}}, {"lang": None, "deep": None}, None]
    columns = {"text": ["a", "b", "c"], "meta": meta, "meta.lang": ["whole", None, "name"]}
    path = write(tmp_path / "a.parquet", columns)
    reader = iter(DocumentReader([path], json_key="meta.deep.text"))
    assert parse(next(reader), "meta.deep.text").text == "inner"
    for line in (2, 3):
        with pytest.raises(LineError, match=rf"row {line}: 'meta.deep.text' is null"):
            parse(next(reader), "meta.deep.text")
    keys = ["meta.deep.text", "meta.lang", "meta.none"]
    assert fields(path, keys) == [
        ("inner", "whole", None),
        (None, None, None),
        (None, "name", None),
    ]


def test_fields_are_strings_or_json_texts_and_only_their_columns_are_read(tmp_path: Path) -> None:
    columns = {
        "text": ["a", "b"],
        "lang": pa.array(["日本語", None]).dictionary_encode(),
        "score": [0.5, None],
        "count": pa.array([7, 2**63], pa.uint64()),
        "good": [True, False],
        "nothing": pa.nulls(2),
        "other": [[1], [2]],
    }
    path = write(tmp_path / "a.parquet", columns)
    assert fields(path, ["good", "lang", "score", "count", "nothing", "missing"]) == [
        ("true", "日本語", "0.5", "7", None, None),
        ("false", None, None, "9223372036854775808", None, None),
    ]


def test_a_null_is_named_by_its_row_or_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a", None, "c"]})
    with pytest.raises(LineError, match=r"a\.parquet, row 2: 'text' is null; mend the row"):
        documents(path)
    assert list(iterate_documents(DocumentReader([path]), on_error="skip")) == ["a", "c"]


def test_invalid_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    damaged = pa.array([b"a\n", b"b\n\xff"]).view(pa.string())
    path = write(tmp_path / "a.parquet", {"text": damaged, "lang": damaged})
    with pytest.raises(LineError, match="row 2: invalid UTF-8"):
        documents(path)
    path = write(tmp_path / "b.parquet", {"text": ["a", "b"], "lang": damaged})
    with pytest.raises(LineError, match="row 2: invalid UTF-8 in 'lang'"):
        fields(path, ["lang"])


@pytest.mark.parametrize(
    ("columns", "json_key", "message"),
    [
        ({"body": ["a"], "id": [1]}, "text", r"no column 'text' \(columns here: 'body', 'id'\)"),
        ({"text": [7]}, "text", "column 'text' is not of strings but of type int64"),
        ({"text": [b"a"]}, "text", "column 'text' is not of strings but of type binary"),
        ({"meta": [{"a": "b"}]}, "meta", "not of strings but of type struct<a: string>"),
        ({"meta": [{"a": "b"}]}, "meta.b", "no column 'meta.b'"),
        ({"text": ["a"]}, "text.a", "no column 'text.a'"),
    ],
)
def test_a_column_that_is_missing_or_no_text_is_refused_before_any_file_is_read(
    tmp_path: Path, columns: dict[str, Any], json_key: str, message: str
) -> None:
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=rf"a\.parquet: .*{message}|{message}.*--json-key"):
        DocumentReader([path], json_key=json_key)


def test_a_field_of_another_type_is_refused_before_any_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a"], "tags": [["b"]]})
    with pytest.raises(DataError, match=r"a\.parquet: field 'tags' is of type list<.*only strings"):
        DocumentReader([path], field_keys=["tags"])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all" * 10, None])
def test_a_damaged_file_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a"] * 1000})
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(DataError, match=r"a\.parquet is damaged, cut short or no Parquet file"):
        DocumentReader([path])


@pytest.mark.parametrize("at", range(0, 2000, 50))
def test_garbled_bytes_are_an_error_or_other_text(tmp_path: Path, at: int) -> None:
    texts = [f"文書 {number}" for number in range(500)]
    path = write(tmp_path / "a.parquet", {"text": texts}, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 0xFF
    path.write_bytes(content)
    with suppress(DataError):
        documents(path)


def test_a_garbled_page_with_a_checksum_is_an_error(tmp_path: Path) -> None:
    texts = [f"文書 {number}" for number in range(500)]
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write(tmp_path / "a.parquet", {"text": texts}, **options)
    content = path.read_bytes()
    path.write_bytes(content.replace("文書 250".encode(), "文書 999".encode()))
    reader = DocumentReader([path])
    with pytest.raises(DataError, match=r"a\.parquet is damaged"):
        list(reader)


def test_a_file_without_rows_gives_no_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    reader = DocumentReader([path])
    assert list(reader) == []
    assert reader.bytes_read == path.stat().st_size


def test_progress_goes_from_batch_to_batch_to_the_size_of_all_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", {"text": ["猫"] * 100}, row_group_size=30)
    second = tmp_path / "b.txt"
    second.write_text("a\n" * 10)
    third = tmp_path / "c.parquet"
    third.write_bytes(first.read_bytes())
    reader = DocumentReader([first, second, third])
    seen = [
        reader.bytes_read
        for number in range(3)
        for _ in reader.batches_of(number, batch_documents=10)
    ]
    assert seen == sorted(seen)
    size = first.stat().st_size
    assert seen[:10] == [size * row // 100 for row in range(10, 101, 10)]
    assert reader.bytes_read == reader.total_bytes == 2 * size + 20


def test_without_pyarrow_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"a\.parquet: .*needs pyarrow.*pip install .*\[parquet\]"):
        DocumentReader([path])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ],
    ids=["dictionary", "common beginnings"],
)
def test_a_long_text_that_many_rows_share_is_read_in_little_memory(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    text = "猫" * 66_000
    path = write(tmp_path / "a.parquet", {"text": [text, None] * 1000}, **options)
    assert path.stat().st_size < 200_000
    reader = DocumentReader([path])
    before = pa.total_allocated_bytes()
    most, read = 0, 0
    for number, document in enumerate(reader, 1):
        assert document.line == number
        assert document.data.decode() == ("" if document.problem else text)
        most = max(most, pa.total_allocated_bytes() - before)
        read += not document.problem
    assert read == 1000
    assert most < 40 << 20


def test_texts_of_small_and_of_large_dictionaries_in_structs_too_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [None if n % 7 == 0 else f"文 {n % 1000}" for n in range(3000)]
    columns = {"text": texts, "meta": [{"text": text} for text in texts]}
    path = write(tmp_path / "a.parquet", columns, row_group_size=1700)
    expected = [text for text in texts if text is not None]
    for most in (1 << 20, 1):
        monkeypatch.setattr("megatron_bert.data.parquet_text._DICTIONARY_BYTES", most)
        for key in ("text", "meta.text"):
            reader = DocumentReader([path], json_key=key)
            assert [row.data.decode() for row in reader if not row.problem] == expected


def test_a_large_row_group_is_read_in_little_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    texts = ["".join(map(chr, random.integers(0x4E00, 0x9000, 20_000))) for _ in range(200)] * 5
    # The page is the least that can be read, and this writer ends one after so many rows at least.
    options = {"use_dictionary": False, "write_batch_size": 10}
    path = write(tmp_path / "a.parquet", {"text": texts}, **options)
    assert pq.ParquetFile(path).num_row_groups == 1
    reader = DocumentReader([path])
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in reader)
    assert most < 20 << 20 < path.stat().st_size
