from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.data.parsing import LineError, ParsedText, parse, parse_all
from megatron_bert.data.raw_documents import RawDocument, RawLines, read_lines
from megatron_bert.data.text import DocumentReader, TextDocuments, iterate_documents
from megatron_bert.errors import DataError

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
@given(frames=st.lists(st.binary(max_size=3000), min_size=1, max_size=4))
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
    with pytest.raises(LineError, match=rf"corpus\.jsonl, line 2: {problem}.*on_error='skip'"):
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
    assert "--on-error" not in caplog.text
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
@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_a_damaged_packed_file_is_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = PACKERS[suffix](jsonl([str(i) * i for i in range(300)]))
    damaged = {"cut": packed[: len(packed) // 2], "garbled": b"garbled" + packed[7:], "empty": b""}
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match="damaged or cut short"):
        documents(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "no such file"),
        ("corpus.csv", "unknown kind"),
        ("a.gz", "unknown kind"),
        ("", "a folder; name the files in it"),
    ],
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
    together = RawLines(document.path, document.line, [document.data], json=True)
    for batch in ([document], together):
        assert parse_all(batch, "text", ["a"], "nfkc")[:2] == (["ネコキロA1 が"], [("Ａ",)])
        assert parse_all(batch, "text")[:2] == (["ﾈｺ㌔Ａ１ か\u3099"], [()])


LINES = st.sampled_from(
    [
        '{"text": "静かな海", "lang": "ja", "year": 1916}',
        '{"lang": null, "text": "a\\tb \u2028\0", "ok": true}',
        '{"text": "b", "lang": {"code": "ja"}, "year": 1.5}',
        '{"text": "c", "year": 100000000000000000000}',
        '{"text": "d", "lang.code": "en"}\r',
        '{"n": NaN, "text": "e"}',
        '{"text": 7}',
        '{"text": "\\ud83d"}',
        '{"body": "f"}',
        '["text"]',
        '"text"',
        "",
        " \r",
        "{",
    ]
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(LINES, max_size=4), st.lists(st.sampled_from(["lang", "year", "ok", "lang.code"])))
def test_lines_are_parsed_together_as_one_by_one(lines: list[str], field_keys: list[str]) -> None:
    together = RawLines(Path("a.jsonl"), 5, [line.encode() for line in lines], json=True)
    alone: list[ParsedText | LineError] = []
    for document in together:
        try:
            alone.append(parse(document, "text", field_keys))
        except LineError as error:
            alone.append(error)
    usable = [one for one in alone if isinstance(one, ParsedText)]
    texts, fields, skipped, unusable = parse_all(together, "text", field_keys, on_error="skip")
    assert (texts, fields) == ([text for text, _ in usable], [some for _, some in usable])
    assert list(map(str, skipped)) == [str(one) for one in alone if isinstance(one, LineError)]
    assert unusable == {n for n, one in enumerate(alone) if isinstance(one, LineError)}
    assert len(together) == len(alone)


@pytest.mark.parametrize("json_lines", [True, False])
@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["", "a", "\r", " ", "猫猫", "b" * 9]), max_size=8), st.data())
def test_lines_are_read_whole_however_many_bytes_come_at_a_time(
    json_lines: bool, lines: list[str], data: st.DataObject
) -> None:
    content = data.draw(st.sampled_from(["", "\ufeff"])) + "\n".join(lines)
    batch_bytes = data.draw(st.integers(1, 12))
    path = Path("a")
    batches = list(read_lines(path, BytesIO(content.encode()), batch_bytes, json=json_lines))
    expected = content.removeprefix("\ufeff").encode().split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [line for batch in batches for line in batch.lines] == expected
    assert [batch.first for batch in batches] == [
        1 + sum(len(batch.lines) for batch in batches[:number]) for number in range(len(batches))
    ]
    documents = [document for batch in batches for document in batch]
    assert sum(map(len, batches)) == len(documents)
    assert documents == [
        RawDocument(path, number, line.removesuffix(b"\r"), json_lines)
        for number, line in enumerate(expected, 1)
        if not json_lines or line.strip()
    ]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1" * 40, "1e999"])
def test_numbers_beyond_the_standard_beside_the_text_are_no_problem(number: str) -> None:
    document = RawDocument(Path("a.jsonl"), 1, f'{{"n": {number}, "text": "海"}}'.encode(), True)
    assert parse(document, "text").text == "海"


@pytest.mark.parametrize("encoding", ["CP932", "UTF-16"])
def test_a_file_of_another_encoding_is_told_with_a_command_that_converts_it(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "it's old.txt"
    path.write_text("日本語の文\n", encoding)
    with pytest.raises(LineError, match="is in another encoding, convert it: iconv") as refused:
        list(iterate_documents(DocumentReader([path])))
    found = re.search(r"convert it: (iconv .*?)(?: \(or|; else)", str(refused.value))
    assert found is not None
    subprocess.run(["bash", "-c", found[1]], check=True)
    new = tmp_path / "utf8-it's old.txt"
    assert list(iterate_documents(DocumentReader([new]))) == ["日本語の文"]
