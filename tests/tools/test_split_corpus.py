from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_bert.command_line.run import run_cli
from megatron_bert.data.split import SplitCounts, split_documents
from megatron_bert.data.text import DocumentReader
from megatron_bert.errors import DataError, UserError
from tools import split_corpus as tool


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(path: Path, key: str = "text") -> list[str]:
    return [json.loads(line)[key] for line in path.read_text("utf-8").splitlines()]


def split(
    folder: Path, texts: list[str], fraction: float
) -> tuple[SplitCounts, list[str], list[str]]:
    reader = DocumentReader([write_corpus(folder / "corpus.jsonl", texts)])
    train, valid = folder / "train.jsonl", folder / "valid.jsonl"
    counts = split_documents(reader, train, valid, fraction, overwrite=True)
    return counts, texts_of(train), texts_of(valid)


def numbered(count: int) -> list[str]:
    return [f"文書 {number}" for number in range(count)]


def test_every_document_falls_on_one_side_in_its_order_and_nothing_else_is_left(
    tmp_path: Path,
) -> None:
    texts = numbered(50)
    _, train, valid = split(tmp_path, texts, 0.2)
    assert train == [text for text in texts if text not in set(valid)]
    assert valid == [text for text in texts if text not in set(train)]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["corpus.jsonl", "train.jsonl", "valid.jsonl"]


def test_lines_keep_all_their_keys(tmp_path: Path) -> None:
    lines = [f'{{"id": {n}, "body": "文書 {n}", "more": {{"a": [1.50]}}}}' for n in range(9)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines), "utf-8")
    (tmp_path / "more.txt").write_text("plain\n")
    reader = DocumentReader([tmp_path / "corpus.jsonl", tmp_path / "more.txt"], json_key="body")
    split_documents(reader, tmp_path / "train.jsonl", tmp_path / "valid.jsonl", 0.3)
    kept = [(tmp_path / f"{name}.jsonl").read_text("utf-8") for name in ("train", "valid")]
    assert sorted("".join(kept).splitlines()) == sorted([*lines, '{"body": "plain"}'])


def test_equal_texts_stay_together(tmp_path: Path) -> None:
    counts, train, valid = split(tmp_path, numbered(20) * 3, 0.5)
    assert counts == SplitCounts(train=30, held_out=30)
    assert not set(train) & set(valid)


@pytest.mark.parametrize(
    ("documents", "fraction", "held_out"),
    [(200, 0.05, 10), (200, 0.5, 100), (10, 0.001, 1), (2, 0.999, 1), (10, 0.999, 9)],
)
def test_the_fraction_is_held_out_but_one_document_at_least_on_either_side(
    tmp_path: Path, documents: int, fraction: float, held_out: int
) -> None:
    counts, train, valid = split(tmp_path, numbered(documents), fraction)
    assert counts == SplitCounts(train=documents - held_out, held_out=held_out)
    assert (len(train), len(valid)) == (documents - held_out, held_out)


def test_the_same_documents_are_held_out_again_in_whatever_order_they_come(
    tmp_path: Path,
) -> None:
    first = split(tmp_path, numbered(100), 0.1)
    assert split(tmp_path, numbered(100), 0.1) == first
    _, _, valid = split(tmp_path, numbered(100)[::-1], 0.1)
    assert valid == first[2][::-1]


def test_a_longer_corpus_holds_out_nothing_else_of_what_it_held_before(tmp_path: Path) -> None:
    _, _, before = split(tmp_path, numbered(100), 0.1)
    _, _, after = split(tmp_path, numbered(110), 10 / 110)
    assert set(after) & set(numbered(100)) <= set(before)


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["a", "a", ""]])
def test_fewer_than_two_different_documents_are_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl: [01] different .*give more text"):
        split(tmp_path, texts, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match=r"is not between 0 and 1"):
        split(tmp_path, numbered(4), fraction)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("side", ["train", "valid"])
@pytest.mark.parametrize("place", ["file/out.jsonl", "folder"])
def test_a_place_that_cannot_be_written_to_is_an_error_and_leaves_nothing(
    tmp_path: Path, side: str, place: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", numbered(4))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    outputs = {"train": tmp_path / "train.jsonl", "valid": tmp_path / "valid.jsonl"}
    outputs[side] = tmp_path / place
    with pytest.raises(UserError, match=f"cannot write {outputs[side]}: "):
        split_documents(DocumentReader([corpus]), outputs["train"], outputs["valid"], 0.5)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["corpus.jsonl", "file", "folder"]


def test_folders_that_are_not_there_are_made(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", numbered(4))
    train, valid = tmp_path / "new" / "train.jsonl", tmp_path / "a" / "b" / "valid.jsonl"
    tool.main(["--input", str(corpus), "--train", str(train), "--valid", str(valid)])
    assert len(texts_of(train) + texts_of(valid)) == 4


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", numbered(4))
    arguments = ["--input", str(corpus), f"{tmp_path}/./corpus.jsonl"]
    arguments += ["--train", str(tmp_path / "t.jsonl"), "--valid", str(tmp_path / "v.jsonl")]
    with pytest.raises(DataError, match=r"--input .*corpus\.jsonl: given twice; give each once"):
        tool.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_broken_line_leaves_nothing_half_written_unless_it_is_to_skip(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", numbered(4))
    with corpus.open("a") as file:
        file.write("{broken\n")
    arguments = ["--input", str(corpus), "--train", str(tmp_path / "train.jsonl")]
    arguments += ["--valid", str(tmp_path / "valid.jsonl")]
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 5: broken JSON"):
        tool.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
    tool.main([*arguments, "--on-error", "skip"])
    assert len(texts_of(tmp_path / "train.jsonl")) == 3
    assert caplog.text.count("left out 1 line") == 1, "told in both passes over the text"


def test_the_tool_splits_several_files_and_says_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first.jsonl"
    first.write_text("".join(json.dumps({"body": text}) + "\n" for text in numbered(10)))
    second = tmp_path / "second.txt"
    second.write_text("a\nb\nc\n")
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    arguments = ["--input", str(first), str(second), "--json-key", "body", "--fraction", "0.3"]
    tool.main([*arguments, "--train", str(train), "--valid", str(valid)])
    assert capsys.readouterr().out == f"wrote {train}: 9 documents, and {valid}: 4\n"
    texts = texts_of(train, "body") + texts_of(valid, "body")
    assert sorted(texts) == sorted([*numbered(10), "a", "b", "c"])


@pytest.mark.parametrize("fraction", ["0", "0.5"])
def test_the_tool_leaves_with_exit_code_2_when_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fraction: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["a"])
    arguments = ["--input", str(corpus), "--fraction", fraction]
    arguments += ["--train", str(tmp_path / "t.jsonl"), "--valid", str(tmp_path / "v.jsonl")]
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: tool.main(arguments))
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize(
    ("train", "valid"),
    [("t.jsonl", "t.jsonl"), ("corpus.jsonl", "v.jsonl"), ("t.jsonl", "corpus.jsonl")],
)
def test_no_file_is_written_over_the_other_or_over_the_corpus(
    tmp_path: Path, train: str, valid: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", numbered(4))
    before = corpus.read_bytes()
    with pytest.raises(DataError, match="two files, and none of the input"):
        split_documents(DocumentReader([corpus]), tmp_path / train, tmp_path / valid, 0.5)
    assert corpus.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("name", ["train.jsonl", "valid.jsonl"])
def test_an_existing_file_is_replaced_only_on_demand(tmp_path: Path, name: str) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", numbered(4))
    (tmp_path / name).write_text("mine")
    arguments = ["--input", str(corpus), "--train", str(tmp_path / "train.jsonl")]
    arguments += ["--valid", str(tmp_path / "valid.jsonl")]
    with pytest.raises(DataError, match=rf"{name} exists already.*--overwrite"):
        tool.main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", name]
    assert (tmp_path / name).read_text() == "mine"
    tool.main([*arguments, "--overwrite"])
    assert len(texts_of(tmp_path / "train.jsonl")) == 3


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    counts, train, valid = split(tmp_path, ["", "一", "二", ""], 0.5)
    assert counts == SplitCounts(train=1, held_out=1)
    assert "" not in train + valid


def test_the_tool_reads_blocks_of_txt_and_columns_of_parquet(tmp_path: Path) -> None:
    blocks, table = tmp_path / "a.txt", tmp_path / "b.parquet"
    blocks.write_text("a\nb\n\nc\n")
    pq.write_table(pa.table({"meta": [{"body": "d"}, {"body": "e"}]}), table)
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    arguments = ["--input", str(blocks), str(table), "--txt-documents", "blank-line"]
    arguments += ["--json-key", "meta.body", "--train", str(train), "--valid", str(valid)]
    tool.main(arguments)
    texts = texts_of(train, "meta.body") + texts_of(valid, "meta.body")
    assert sorted(texts) == ["a\nb", "c", "d", "e"]


@pytest.mark.parametrize("name", ["z.txt", "z.jsonl.gz", "z.txt.zst", "z"])
def test_a_name_that_is_read_as_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    reader = DocumentReader([write_corpus(tmp_path / "corpus.jsonl", numbered(9))])
    for pair in ((name, "valid.jsonl"), ("train.jsonl", name)):
        with pytest.raises(DataError, match=r"ends in \.jsonl, e\.g\. .*/z\.jsonl$"):
            split_documents(reader, *(tmp_path / part for part in pair), 0.3)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
