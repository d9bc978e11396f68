"""Extracting texts from raw documents: UTF-8, JSON, the requested fields, normalisation."""

from __future__ import annotations

import json
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import orjson

from megatron_bert.command_line.arguments import argument
from megatron_bert.data.raw_documents import RawBatch, RawDocument, RawLines
from megatron_bert.errors import DataError

OnError = Literal["fail", "skip"]
"""What happens at a line that cannot be used: it is skipped and counted, or the job fails."""

Normalization = Literal["none", "nfkc"]
"""Text as it stands, or in Unicode's normalization form KC: full-width letters as ASCII, half-width
kana as full-width, `㌔` as `キロ`; it cannot be undone."""


class LineError(DataError):
    """A line or row of a file cannot be used; the message names file, number and remedy.

    Attributes:
        problem: the message without the remedy.
    """

    def __init__(self, problem: str, unit: str, hint: str = "") -> None:
        skip = argument("on_error", "skip")
        super().__init__(f"{problem}; {hint}mend the {unit}, or leave such {unit}s out with {skip}")
        self.problem = problem


class ParsedText(NamedTuple):
    """A document's text and, in the order of the field keys, the values of its fields.

    A string is kept as it is, a number or boolean becomes its JSON text, and a field that is absent
    or null is None.
    """

    text: str
    fields: tuple[str | None, ...] = ()


def parse(document: RawDocument, json_key: str, field_keys: Sequence[str] = ()) -> ParsedText:
    """Text and fields of a raw document.

    A key that the object does not have is taken as a dotted path into nested objects. `json_key`
    and `field_keys` must be those of the document's reader.

    Raises:
        LineError: invalid UTF-8, broken JSON, no such key, a text that is not a string, a field
            that is an object or a list, or half a surrogate pair, which no UTF-8 file can hold.
    """
    if document.problem:
        raise _line_error(document, document.problem)
    text = _decode(document)
    values = document.fields
    if document.json:
        values = _json_object(document, text)
        text = _json_text(document, values, json_key)
    fields = tuple([_field(document, key, find_value(values, key)) for key in field_keys])
    # Only an escape can bring in a lone surrogate: decoded UTF-8 has none.
    if b"\\u" in document.data:
        for key, value in zip((json_key, *field_keys), (text, *fields), strict=True):
            if value is not None and not _is_encodable(value):
                raise _line_error(document, f"{key!r} holds half a surrogate pair")
    return ParsedText(text, fields)


class ParsedTexts(NamedTuple):
    """The content of many documents.

    Attributes:
        texts: texts of the documents that can be used.
        fields: `ParsedText.fields` of each of them.
        skipped: errors of the others.
        unusable: indices of the others among all documents.
    """

    texts: list[str]
    fields: list[tuple[str | None, ...]]
    skipped: list[LineError]
    unusable: frozenset[int]


def parse_all(
    documents: RawBatch,
    json_key: str,
    field_keys: Sequence[str] = (),
    normalize: Normalization = "none",
    on_error: OnError = "fail",
) -> ParsedTexts:
    """Normalized texts and fields of many documents; far faster than one by one if all are valid.

    Raises:
        LineError: as `parse`, if `on_error` is `fail`.
    """
    parsed: list[ParsedText] = []
    skipped: dict[int, LineError] = {}
    quick = _parse_lines(documents, json_key, field_keys)
    if quick is None:
        for number, document in enumerate(documents):
            try:
                parsed.append(parse(document, json_key, field_keys))
            except LineError as error:
                if on_error == "fail":
                    raise
                skipped[number] = error
        quick = [text for text, _ in parsed], [fields for _, fields in parsed]
    texts, fields = quick
    if normalize == "nfkc":
        # Text that is already normalized is recognised in one quick pass and returned as it is.
        texts = [unicodedata.normalize("NFKC", text) for text in texts]
    return ParsedTexts(texts, fields, list(skipped.values()), frozenset(skipped))


def _parse_lines(
    batch: RawBatch, json_key: str, field_keys: Sequence[str]
) -> tuple[list[str], list[tuple[str | None, ...]]] | None:
    """Texts and fields of lines that are all valid and ordinary.

    None if one is not: then each line must be parsed by itself. orjson is several times as fast as
    json, but accepts less (no NaN) and reports errors in less detail.
    """
    if not isinstance(batch, RawLines):
        return None
    try:
        if not batch.json:
            texts = [line.removesuffix(b"\r").decode() for line in batch.lines]
            return texts, [(None,) * len(field_keys)] * len(texts)
        if not field_keys:
            texts = [orjson.loads(line)[json_key] for line in batch.lines if line]
            fields: list[tuple[str | None, ...]] = [()] * len(texts)
        else:
            records = [orjson.loads(line) for line in batch.lines if line]
            texts = [record[json_key] for record in records]
            fields = [_quick_fields(record, field_keys) for record in records]
    except (UnicodeDecodeError, orjson.JSONDecodeError, TypeError, KeyError):
        return None
    return (texts, fields) if set(map(type, texts)) <= {str} else None


def _quick_fields(record: dict[str, Any], field_keys: Sequence[str]) -> tuple[str | None, ...]:
    """Values of fields; raises `TypeError` for one that needs the slow path."""
    fields = []
    for key in field_keys:
        value = record.get(key)
        if type(value) is int or type(value) is bool:
            value = str(value).lower()
        # orjson turns integers that are too large into floats; a dot may lead into an object.
        elif not isinstance(value, str) and (value is not None or "." in key):
            raise TypeError(key)
        fields.append(value)
    return tuple(fields)


def find_value(values: Mapping[str, Any], key: str) -> Any:
    """Value of a key, or of a path `key.key` into nested objects; None if there is none."""
    if key in values:
        return values[key]
    name, _, rest = key.partition(".")
    inner = values.get(name) if rest else None
    return find_value(inner, rest) if isinstance(inner, dict) else None


def _decode(document: RawDocument) -> str:
    try:
        return document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        # Offsets count from the document's start; in a block that is not the line's start.
        lines = document.data[: error.start].count(b"\n") if document.unit == "line" else 0
        problem = f"invalid UTF-8 ({error.reason})"
        hint = _conversion(document)
        raise _line_error(document, problem, document.line + lines, hint) from error


def _conversion(document: RawDocument) -> str:
    """How to convert a file that may be in another encoding; empty for a compressed file."""
    path = document.path
    if path.suffix not in (".jsonl", ".txt"):
        return ""
    is_utf16 = document.data.startswith((b"\xff\xfe", b"\xfe\xff"))
    encoding = "UTF-16" if is_utf16 else "CP932"
    new = shlex.quote(str(path.with_name(f"utf8-{path.name}")))
    example = "" if is_utf16 else " (or EUC-JP, as it may be)"
    return (
        f"if all of the file is in another encoding, convert it: iconv -f {encoding} -t UTF-8 "
        f"{shlex.quote(str(path))} > {new}{example}; else "
    )


def _json_object(document: RawDocument, decoded: str) -> dict[str, Any]:
    try:
        value = json.loads(decoded)
    # Besides JSONDecodeError: a number with more digits than Python converts; too deep nesting.
    except (ValueError, RecursionError) as error:
        problem = f"broken JSON ({error})"
        raise _line_error(document, problem, hint=_one_object_a_line(document)) from error
    if not isinstance(value, dict):
        hint = _one_object_a_line(document)
        raise _line_error(document, "not a JSON object", hint=hint)
    return value


def _one_object_a_line(document: RawDocument) -> str:
    """How to convert a file that may be one JSON array; empty for other lines and for rows."""
    path, begins_array = document.path, document.data.lstrip().startswith(b"[")
    if document.line != 1 or not begins_array or path.suffix != ".jsonl":
        return ""
    new = shlex.quote(str(path.with_name(f"lines-{path.name}")))
    return (
        "if the file is one JSON array, write an object a line: jq -c '.[]' "
        f"{shlex.quote(str(path))} > {new}; else "
    )


def _json_text(document: RawDocument, values: Mapping[str, Any], json_key: str) -> str:
    text = find_value(values, json_key)
    if isinstance(text, str):
        return text
    if text is None and json_key not in values:
        keys = ", ".join(repr(key) for key in list(values)[:8]) or "none"
        raise _line_error(
            document,
            f"no key {json_key!r} (keys here: {keys}); name the text's with {argument('json_key')}",
        )
    raise _line_error(document, f"{json_key!r} is not a string but {type(text).__name__}")


def _field(document: RawDocument, key: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _line_error(document, f"invalid UTF-8 in {key!r} ({error.reason})") from error
    raise _line_error(
        document, f"field {key!r} is no string, number or boolean but {type(value).__name__}"
    )


def _line_error(
    document: RawDocument, problem: str, line: int | None = None, hint: str = ""
) -> LineError:
    unit = document.unit
    return LineError(f"{document.path}, {unit} {line or document.line}: {problem}", unit, hint)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
