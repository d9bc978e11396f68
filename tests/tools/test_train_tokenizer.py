from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bert.data.tokenizer import SPECIAL_PIECES, Tokenizer
from megatron_bert.data.tokenizer_training import train_tokenizer, write_model
from megatron_bert.errors import DataError, UserError
from tools import train_tokenizer as tool

TOOL = Path(tool.__file__)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_tool_writes_a_tokenizer_with_every_special_piece(
    tiny_texts: list[str], tmp_path: Path
) -> None:
    half = len(tiny_texts) // 2
    first = write_jsonl(tmp_path / "first.jsonl", tiny_texts[:half])
    second = tmp_path / "second.txt"
    second.write_text("\n".join(tiny_texts[half:]))
    output = tmp_path / "new" / "t.model"
    command = [sys.executable, TOOL, "--input", first, second, "--vocab-size", "500"]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "500 pieces" in done.stdout
    reading, training = done.stderr.splitlines()
    assert reading == "reading 2 files"
    assert re.match(r"training 500 pieces on \d+ lines", training)
    tokenizer = Tokenizer.load(output)
    assert tokenizer.vocab_size == 500
    assert [tokenizer.id_to_piece(i) for i in range(8)] == list(SPECIAL_PIECES)
    assert [path.name for path in output.parent.iterdir()] == ["t.model"]


@pytest.mark.parametrize("max_sentences", [100, 10_000])
def test_the_same_text_gives_the_same_model(tiny_texts: list[str], max_sentences: int) -> None:
    models = {train_tokenizer(tiny_texts, 480, max_sentences=max_sentences) for _ in range(2)}
    assert len(models) == 1


def test_the_largest_vocabulary_that_an_error_names_can_be_had(tiny_texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"100000 is too large.*at most") as error:
        train_tokenizer(tiny_texts, 100_000)
    largest = re.search(r"set --vocab-size to (\d+)", str(error.value))
    assert largest is not None
    train_tokenizer(tiny_texts, int(largest[1]))


def test_a_vocabulary_without_room_for_the_characters_is_refused(tiny_texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"280 is too small.*need \d+"):
        train_tokenizer(tiny_texts, 280)


@pytest.mark.parametrize(
    ("vocab_size", "max_sentences", "message"),
    [
        (0, 9, "0 is too small"),
        (264, 9, "264 is too small"),
        (500, 0, "--max-sentences = 0: "),
    ],
)
def test_numbers_out_of_range_are_refused_before_any_document_is_read(
    vocab_size: int, max_sentences: int, message: str
) -> None:
    documents = iter(["a"])
    with pytest.raises(UserError, match=message):
        train_tokenizer(documents, vocab_size, max_sentences=max_sentences)
    assert list(documents) == ["a"]


@pytest.mark.parametrize("texts", [[], ["", "\n\n"]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match="0 lines of text"):
        train_tokenizer(texts, 500)


def test_an_error_of_the_input_comes_through_as_it_is() -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise DataError("line 2 is broken")

    with pytest.raises(DataError, match=r"^line 2 is broken$"):
        train_tokenizer(broken(), 500)


def test_lines_longer_than_sentencepiece_takes_are_not_lost() -> None:
    model = train_tokenizer(["猫犬鳥" * 30_000], 270)
    assert "猫".encode() in model


def test_a_broken_line_stops_the_tool_unless_it_is_to_skip(
    tiny_texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", tiny_texts)
    with corpus.open("a") as file:
        file.write("{broken\n")
    output = tmp_path / "t.model"
    command = ["--input", str(corpus), "--vocab-size", "480", "--output", str(output)]
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 301: broken JSON"):
        tool.main(command)
    assert not output.exists()
    tool.main([*command, "--on-error", "skip"])
    assert output.read_bytes() == train_tokenizer(tiny_texts, 480)


def test_an_output_that_no_model_can_have_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in \.model"):
        tool.main(["--input", "none.jsonl", "--vocab-size", "9", "--output", str(tmp_path / "t")])


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "t.model"
    with pytest.raises(UserError, match=r"cannot write .*name another file"):
        write_model(b"model", output)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["too little text to train on"])
    with pytest.raises(UserError, match=r"cannot write .*name another file"):
        tool.main(["--input", str(corpus), "--vocab-size", "500", "--output", str(output)])


def test_a_folder_in_a_models_place_is_an_error_before_training(tmp_path: Path) -> None:
    output = tmp_path / "t.model"
    output.mkdir()
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["too little text to train on"])
    command = ["--input", str(corpus), "--vocab-size", "9", "--output", str(output)]
    with pytest.raises(UserError, match="it is a folder; name a file in it"):
        tool.main([*command, "--overwrite"])


def test_an_existing_model_is_replaced_only_when_asked(
    tiny_texts: list[str], tmp_path: Path
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", tiny_texts)
    output = tmp_path / "t.model"
    output.write_bytes(b"another")
    arguments = ["--input", str(corpus), "--vocab-size", "500", "--output", str(output)]
    with pytest.raises(DataError, match="--overwrite"):
        tool.main(arguments)
    assert output.read_bytes() == b"another"
    tool.main([*arguments, "--overwrite"])
    assert Tokenizer.load(output).vocab_size == 500


def test_with_allow_fewer_the_vocabulary_size_is_an_upper_limit(
    tiny_texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", tiny_texts)
    output = tmp_path / "t.model"
    arguments = ["--input", str(corpus), "--output", str(output), "--vocab-size"]
    with pytest.raises(DataError, match=r"100000 is too large"):
        tool.main([*arguments, "100000"])
    tool.main([*arguments, "100000", "--allow-fewer"])
    pieces = Tokenizer.load(output).vocab_size
    assert 500 < pieces < 100_000
    assert f"{pieces:,} pieces, not 100,000: this text has no more" in capsys.readouterr().out
    tool.main([*arguments, "480", "--allow-fewer", "--overwrite"])
    assert Tokenizer.load(output).vocab_size == 480
