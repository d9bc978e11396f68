"""JGLUE's files: found, read and checked, so that an error names file, line and field."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from megatron_bert.errors import DataError
from megatron_bert.jglue.tasks import JNLI_LABELS, MARC_JA_LABELS, NUM_CHOICES

_REMEDY = "mend it, or copy JGLUE's file again"


@dataclass(frozen=True)
class Labelled:
    """A text or a pair of texts.

    Attributes:
        texts: one or two.
        label: a class number, or a similarity from 0 to 5.
    """

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Choice:
    """A question with `NUM_CHOICES` choices, of which the one with index `label` is right."""

    question: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Answer:
    """An answer's text, and the index of its first character in the context."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question whose answers are in a context; training uses the first of them."""

    question: str
    context: str
    answers: tuple[Answer, ...]


Example: TypeAlias = Labelled | Choice | Question


@dataclass(frozen=True)
class TaskFile:
    """The rows of a file that are used.

    Attributes:
        path: of the file.
        sha256: of the whole file.
        examples: the first rows, as many as were asked for.
    """

    path: Path
    sha256: str
    examples: Sequence[Any]


def read_task_file(task: str, folder: Path, split: str, limit: int | None = None) -> TaskFile:
    """Read the one file `SPLIT-*.json` of a folder.

    Args:
        task: name of the task.
        folder: holds the file.
        split: `train` or `valid`.
        limit: maximum number of rows (questions, for JSQuAD), from the first; all are checked.

    Raises:
        DataError: there is no such file or more than one, it cannot be read, or a row lacks a field
            or has a value that is invalid for the task.
    """
    path = _find(folder, split)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    examples = _READERS[task](path, content)
    if not examples:
        raise DataError(f"{path}: holds no rows; {_REMEDY}")
    return TaskFile(path, hashlib.sha256(content).hexdigest(), list(islice(examples, limit)))


def _find(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder; give one that holds JGLUE's task files")
    found = sorted(folder.glob(f"{split}-*.json"))
    if not found:
        raise DataError(
            f"--data {folder}: holds no {split}-*.json; put JGLUE's there: training needs "
            "train-*.json and evaluation valid-*.json"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"--data {folder}: holds {names}; leave one {split} file there")
    return found[0]


class _Record:
    """A JSON object at a place in a file; its fields are checked as they are read."""

    def __init__(self, place: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise DataError(f"{place}: is no JSON object; {_REMEDY}")
        self._place, self._value = place, value

    def field(self, name: str, kinds: type | tuple[type, ...], meant: str) -> Any:
        if name not in self._value:
            raise DataError(f"{self._place}: the field {name!r} is missing; {_REMEDY}")
        value = self._value[name]
        # A JSON true is not a number, although Python's True is an int.
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.wrong(name, meant)
        return value

    def text(self, name: str) -> str:
        return str(self.field(name, str, "a string"))

    def one_of(self, name: str, values: Sequence[str]) -> int:
        """Return the index of the field's value in `values`."""
        meant = "one of " + ", ".join(values)
        value = self.field(name, str, meant)
        if value not in values:
            raise self.wrong(name, meant)
        return values.index(value)

    def records(self, name: str) -> Iterator[_Record]:
        for number, value in enumerate(self.field(name, list, "a list")):
            yield _Record(f"{self._place}, {name}[{number}]", value)

    def wrong(self, name: str, meant: str) -> DataError:
        shown = orjson.dumps(self._value[name]).decode()[:60]
        return DataError(
            f"{self._place}: the field {name!r} is {shown}, but must be {meant}; {_REMEDY}"
        )


def _lines(path: Path, content: bytes) -> Iterator[_Record]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{place}: is no JSON ({error}); {_REMEDY}") from error
            yield _Record(place, value)


def _read_jsts(path: Path, content: bytes) -> list[Labelled]:
    meant = "a number from 0 to 5"
    examples = []
    for row in _lines(path, content):
        label = float(row.field("label", (int, float), meant))
        if not (math.isfinite(label) and 0 <= label <= 5):
            raise row.wrong("label", meant)
        examples.append(Labelled((row.text("sentence1"), row.text("sentence2")), label))
    return examples


def _read_jnli(path: Path, content: bytes) -> list[Labelled]:
    return [
        Labelled((row.text("sentence1"), row.text("sentence2")), row.one_of("label", JNLI_LABELS))
        for row in _lines(path, content)
    ]


def _read_marc_ja(path: Path, content: bytes) -> list[Labelled]:
    return [
        Labelled((row.text("sentence"),), row.one_of("label", MARC_JA_LABELS))
        for row in _lines(path, content)
    ]


def _read_jcommonsenseqa(path: Path, content: bytes) -> list[Choice]:
    meant = f"a whole number from 0 to {NUM_CHOICES - 1}"
    examples = []
    for row in _lines(path, content):
        label = row.field("label", int, meant)
        if not 0 <= label < NUM_CHOICES:
            raise row.wrong("label", meant)
        choices = tuple(row.text(f"choice{number}") for number in range(NUM_CHOICES))
        examples.append(Choice(row.text("question"), choices, label))
    return examples


def _read_jsquad(path: Path, content: bytes) -> list[Question]:
    """One JSON document in the format of SQuAD 1.1; places in it are named by their path."""
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: is no JSON ({error}); {_REMEDY}") from error
    examples = []
    for article in _Record(str(path), document).records("data"):
        for paragraph in article.records("paragraphs"):
            context = paragraph.text("context")
            for asked in paragraph.records("qas"):
                answers = tuple(
                    Answer(answer.text("text"), answer.field("answer_start", int, "a whole number"))
                    for answer in asked.records("answers")
                )
                if not answers:
                    raise asked.wrong("answers", "a list of at least one answer")
                examples.append(Question(asked.text("question"), context, answers))
    return examples


_READERS: Mapping[str, Callable[[Path, bytes], Sequence[Example]]] = {
    "marc_ja": _read_marc_ja,
    "jsts": _read_jsts,
    "jnli": _read_jnli,
    "jsquad": _read_jsquad,
    "jcommonsenseqa": _read_jcommonsenseqa,
}
