"""Task files: what is read, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.errors import DataError
from megatron_bert.jglue.task_files import Answer, Choice, Labelled, read_task_file
from megatron_bert.jglue.tasks import TASKS
from tests.jglue.conftest import CONTEXT, row, write_split, write_task


@pytest.mark.parametrize(
    ("task", "split", "count"),
    [
        ("jsts", "train", 12_451),
        ("jsts", "valid", 1_457),
        ("jnli", "valid", 2_434),
        ("jsquad", "valid", 4_442),
        ("jcommonsenseqa", "train", 8_939),
        ("jcommonsenseqa", "valid", 1_119),
    ],
)
def test_the_published_files_are_read_whole(jglue: Path, task: str, split: str, count: int) -> None:
    assert len(read_task_file(task, jglue / task, split).examples) == count


def test_rows_become_examples(tmp_path: Path) -> None:
    read = {
        task: read_task_file(task, write_task(task, tmp_path / task), "train").examples
        for task in TASKS
    }
    assert read["jsts"][1] == Labelled(("名前名前", "猫"), 0.5)
    assert read["jnli"][:2] == [Labelled(("猫", "猫"), 0), Labelled(("名前名前", "猫"), 1)]
    assert read["marc_ja"][1] == Labelled(("名前名前",), 1)
    assert read["jcommonsenseqa"][3] == Choice("猫?", ("名", "名", "名", "猫", "名"), 3)
    question = read["jsquad"][1]
    assert question.context == CONTEXT
    assert question.answers == (Answer("まだ無い", CONTEXT.index("まだ無い")),) * 2


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    for task in TASKS:
        folder = write_task(task, tmp_path / task)
        whole = read_task_file(task, folder, "train")
        first = read_task_file(task, folder, "train", 3)
        assert first.examples == whole.examples[:3]
        assert first.sha256 == whole.sha256


REQUIRED = {
    "marc_ja": ["sentence", "label"],
    "jsts": ["sentence1", "sentence2", "label"],
    "jnli": ["sentence1", "sentence2", "label"],
    "jcommonsenseqa": ["question", "label", *(f"choice{n}" for n in range(5))],
    "jsquad": ["question", "answers"],
}


@pytest.mark.parametrize(
    ("task", "field"), [(task, field) for task, fields in REQUIRED.items() for field in fields]
)
def test_a_missing_field_is_named_with_file_and_row(tmp_path: Path, task: str, field: str) -> None:
    rows = [row(task, n) for n in range(3)]
    del rows[1][field]
    write_split(task, tmp_path / "train-v1.3.json", rows)
    place = r"qas\[1\]" if task == "jsquad" else "line 2"
    with pytest.raises(DataError, match=rf"train-v1\.3\.json, .*{place}: the field '{field}'"):
        read_task_file(task, tmp_path, "train")


@pytest.mark.parametrize(
    ("task", "field", "value", "meant"),
    [
        ("jsts", "label", "4.2", "a number from 0 to 5"),
        ("jsts", "label", 5.1, "a number from 0 to 5"),
        ("jsts", "label", True, "a number from 0 to 5"),
        ("jsts", "sentence1", None, "a string"),
        ("jnli", "label", "Entailment", "one of entailment, contradiction, neutral"),
        ("jnli", "label", 0, "one of entailment, contradiction, neutral"),
        ("marc_ja", "label", "neutral", "one of positive, negative"),
        ("jcommonsenseqa", "label", 5, "a whole number from 0 to 4"),
        ("jcommonsenseqa", "label", 1.0, "a whole number from 0 to 4"),
        ("jcommonsenseqa", "choice4", 7, "a string"),
        ("jsquad", "answers", [], "at least one answer"),
        ("jsquad", "answers", {}, "a list"),
    ],
)
def test_a_value_that_a_task_has_no_use_for_is_told_with_what_it_must_be(
    tmp_path: Path, task: str, field: str, value: Any, meant: str
) -> None:
    rows = [row(task, n) | ({field: value} if n == 2 else {}) for n in range(3)]
    write_split(task, tmp_path / "train-v1.3.json", rows)
    place = r"qas\[2\]" if task == "jsquad" else "line 3"
    with pytest.raises(DataError, match=rf"{place}: the field '{field}' is .*{meant}"):
        read_task_file(task, tmp_path, "train")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"text": "猫"}, r"answers\[0\]: the field 'answer_start' is missing"),
        ({"text": "猫", "answer_start": "0"}, "'answer_start' is \"0\", but must be a whole"),
        ({"answer_start": 0}, r"answers\[0\]: the field 'text' is missing"),
        ("猫", r"answers\[0\]: is no JSON object"),
    ],
)
def test_an_answer_is_checked_too(tmp_path: Path, answer: Any, told: str) -> None:
    write_split("jsquad", tmp_path / "valid-v1.3.json", [row("jsquad", 0) | {"answers": [answer]}])
    with pytest.raises(DataError, match=told):
        read_task_file("jsquad", tmp_path, "valid")


@pytest.mark.parametrize("field", ["data", "paragraphs", "context", "qas"])
def test_the_frame_of_a_jsquad_file_is_checked_too(tmp_path: Path, field: str) -> None:
    paragraph = {"context": "猫", "qas": [row("jsquad", 0)]}
    document = {"data": [{"title": "猫", "paragraphs": [paragraph]}]}
    for part in (document, document["data"][0], paragraph):
        part.pop(field, None)
    (tmp_path / "valid-v1.3.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=rf"valid-v1\.3\.json.*: the field '{field}' is missing"):
        read_task_file("jsquad", tmp_path, "valid")


@pytest.mark.parametrize("task", ["jsts", "jsquad"])
@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "no"), (b'{"a": 1', "is no JSON"), (b"[1]", "is no JSON object"), (b'"\xff"', "JSON")],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, task: str, content: bytes, told: str
) -> None:
    (tmp_path / "train-v1.3.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"train-v1\.3\.json.*{told}"):
        read_task_file(task, tmp_path, "train")


def test_the_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-v1.3.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds no valid-\*\.json"):
        read_task_file("jsts", tmp_path, "valid")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read_task_file("jsts", tmp_path / "nowhere", "valid")


def test_of_two_versions_one_must_go(tmp_path: Path) -> None:
    for version in ("1.1", "1.3"):
        write_split("jsts", tmp_path / f"train-v{version}.json", [row("jsts", 0)])
    with pytest.raises(DataError, match=r"train-v1\.1\.json, train-v1\.3\.json; leave one"):
        read_task_file("jsts", tmp_path, "train")
