from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.config.errors import DataError
from megatron_bert.data.text import (
    DocumentReader,
    LineError,
    ParsedText,
    RawDocument,
    TextDocuments,
    _quick_text,
    iterate_documents,
    parse,
)

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXTS = ["吾輩は猫である。\n名前はまだ無い。", "", "The fox", "  spaces  "]


def raw_json(content: str) -> RawDocument:
    return RawDocument(Path("corpus.jsonl"), 7, content.encode(), json=True)


def jsonl(texts: list[str]) -> bytes:
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    return "".join(lines).encode()


def documents(path: Path, txt_documents: TextDocuments = "line") -> list[str]:
    return list(iterate_documents(DocumentReader([path], txt_documents)))


@pytest.mark.parametrize("suffix", PACKERS)
def test_jsonl_gives_its_texts_in_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](jsonl(TEXTS)))
    assert documents(path) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_line_of_txt_is_a_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus.txt{suffix}"
    path.write_bytes(PACKERS[suffix]("一\r\n\n 二\n三".encode()))
    assert documents(path) == ["一", "", " 二", "三"]


def test_blank_lines_end_the_documents_of_txt_where_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n一\n二\n \n\n三\n")
    assert documents(path, "blank-line") == ["一\n二", "三"]
    assert [raw.line for raw in DocumentReader([path], "blank-line")] == [2, 6]


def test_a_byte_order_mark_and_blank_lines_of_jsonl_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(["a"]) + b"\r\n\n" + jsonl(["b"]))
    assert documents(path) == ["a", "b"]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(frames=st.lists(st.binary(max_size=3000), max_size=4))
def test_all_frames_of_a_zstd_file_are_read(
    tmp_path_factory: pytest.TempPathFactory, frames: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("zstd") / "corpus.txt.zst"
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames))
    joined = b"\n".join(raw.data for raw in DocumentReader([path]))
    expected = b"".join(frames).removeprefix(b"\xef\xbb\xbf")
    assert joined == b"\n".join(
        line.removesuffix(b"\r") for line in expected.removesuffix(b"\n").split(b"\n")
    )


def test_a_zstd_file_of_the_longest_window_is_read(tmp_path: Path) -> None:
    window = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=window).compressobj()
    path = tmp_path / "corpus.txt.zst"
    path.write_bytes(packer.compress("猫\n".encode()) + packer.flush())
    assert documents(path) == ["猫"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "a"', "broken JSON"),
        (b'["a"]', "not a JSON object"),
        (b'{"body": "a"}', r"no key 'text' \(keys here: 'body'\)"),
        (b'{"text": 7}', "'text' is not a string but int"),
        (b'{"text": null}', "'text' is not a string but NoneType"),
        (b'{"text": "\\ud83d"}', "'text' holds half a surrogate pair"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "broken JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_or_skipped(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl(["first"]) + line + b"\n" + jsonl(["third"]))
    with pytest.raises(LineError, match=rf"corpus\.jsonl, line 2: {problem}.*--on-error skip"):
        documents(path)
    assert list(iterate_documents(DocumentReader([path]), on_error="skip")) == ["first", "third"]


def test_the_first_skipped_lines_are_named_and_all_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"{\n" * 30 + jsonl(["a"]))
    assert list(iterate_documents(DocumentReader([path]), on_error="skip")) == ["a"]
    assert len(caplog.messages) == 21
    assert "corpus.jsonl, line 20: broken JSON" in caplog.messages[19]
    assert caplog.messages[20] == "left out 30 lines that cannot be used"


def test_invalid_utf8_inside_a_block_is_told_by_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"a\n\nb\nc\xe3\x81\n")
    with pytest.raises(LineError, match="line 4: invalid UTF-8"):
        documents(path, "blank-line")


def test_a_whole_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert documents(path) == ["\U0001f600"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_a_damaged_packed_file_is_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = PACKERS[suffix](jsonl([str(i) * i for i in range(300)]))
    half = len(packed) // 2
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(packed[:half] if damage == "cut" else b"garbled" + packed[7:])
    with pytest.raises(DataError, match="damaged or cut short"):
        documents(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.jsonl", "no such file"), ("corpus.csv", "unknown kind"), ("a.gz", "unknown kind")],
)
def test_a_missing_or_unknown_file_is_refused_before_any_is_read(
    tmp_path: Path, name: str, message: str
) -> None:
    good = tmp_path / "good.jsonl"
    good.write_bytes(jsonl(["a"]))
    with pytest.raises(DataError, match=message):
        DocumentReader([good, tmp_path / name])


@pytest.mark.parametrize("suffix", PACKERS)
def test_progress_ends_at_the_size_of_all_files(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{i}.txt{suffix}" for i in range(3)]
    for path in paths:
        path.write_bytes(PACKERS[suffix](b"a\n" * 1000))
    reader = DocumentReader(paths)
    seen = [reader.bytes_read for _ in reader]
    assert seen == sorted(seen)
    assert reader.bytes_read == reader.total_bytes == sum(p.stat().st_size for p in paths)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('"ja"', "ja"),
        ('""', ""),
        ("null", None),
        ("7", "7"),
        ("-1.5", "-1.5"),
        ("1.0", "1.0"),
        ("true", "true"),
        ("false", "false"),
    ],
)
def test_the_value_of_a_field_is_its_string_or_its_json_text(
    value: str, expected: str | None
) -> None:
    document = raw_json(f'{{"text": "猫", "a": {value}}}')
    assert parse(document, "text", ["a", "b"]) == ParsedText("猫", (expected, None))


def test_a_dot_leads_into_objects_unless_the_whole_name_is_a_key() -> None:
    document = raw_json('{"a": {"b": {"c": "deep"}, "b.c": "inner"}, "a.b": "whole", "s": "x"}')
    keys = ["a.b", "a.b.c", "a.d", "s.x", "a.b.c.d"]
    assert parse(document, "a.b.c", keys) == ParsedText(
        "inner", ("whole", "inner", None, None, None)
    )


def test_a_line_of_txt_has_no_fields() -> None:
    document = RawDocument(Path("corpus.txt"), 1, b"a", json=False)
    assert parse(document, "text", ["lang"]) == ParsedText("a", (None,))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{}", "field 'a' is no string, number or boolean but dict"),
        ("[1]", "field 'a' is no string, number or boolean but list"),
        ('"\\ud83d"', "'a' holds half a surrogate pair"),
    ],
)
def test_a_field_that_cannot_be_counted_is_an_error_of_its_line(value: str, problem: str) -> None:
    with pytest.raises(LineError, match=rf"corpus\.jsonl, line 7: {problem}"):
        parse(raw_json(f'{{"text": "b", "a": {value}}}'), "text", ["a"])


def test_nfkc_normalizes_the_text_and_no_field() -> None:
    document = raw_json('{"text": "ﾈｺ㌔Ａ１ か\\u3099", "a": "Ａ"}')
    assert parse(document, "text", ["a"], "nfkc") == ParsedText("ネコキロA1 が", ("Ａ",))
    assert parse(document, "text").text == "ﾈｺ㌔Ａ１ か\u3099"


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none(), max_size=3))
def test_the_quick_way_reads_what_the_slow_one_does(fields: dict[str, object]) -> None:
    for line in (
        json.dumps({"text": "静かな海 \u2028\0", **fields}),
        json.dumps({**fields, "text": "a\tb"}, ensure_ascii=False),
    ):
        text = json.loads(line)["text"]
        assert _quick_text(line.encode(), "text") == (text if isinstance(text, str) else None)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1" * 40, "1e999"])
def test_numbers_beyond_the_standard_beside_the_text_are_no_problem(number: str) -> None:
    document = RawDocument(Path("a.jsonl"), 1, f'{{"n": {number}, "text": "海"}}'.encode(), True)
    assert parse(document, "text").text == "海"
