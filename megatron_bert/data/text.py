"""Documents out of text files: `.jsonl` and `.txt`, plain or packed as `.gz` or `.zst`, `.parquet`.

Reading is split in two, so that a reader can stay ahead of the threads that parse: a
`DocumentReader` yields raw documents in file order with their line numbers, `parse` turns one
into text.
"""

from __future__ import annotations

import gzip
import json
import logging
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, NamedTuple

import orjson
import zstandard

from megatron_bert.config.errors import DataError
from megatron_bert.data.decompression import decompressed
from megatron_bert.data.parquet_text import ParquetText

logger = logging.getLogger(__name__)

TextDocuments = Literal["line", "blank-line"]
"""What a document is in a `.txt` file: a line, or a block of lines ended by blank lines."""

OnError = Literal["skip", "fail"]
"""What happens at a line that cannot be used: it is left out and counted, or the work ends."""

Normalization = Literal["none", "nfkc"]
"""Text as it stands, or in Unicode's normalization form KC: full-width letters as ASCII, half-width
kana as full-width, `㌔` as `キロ`; it cannot be undone."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SKIPS_SHOWN = 20


class LineError(DataError):
    """A line or row of a file cannot be used; the message names file, number and remedy."""


class RawDocument(NamedTuple):
    """Bytes of one document as they stand in the file.

    Attributes:
        path: the file.
        line: number of the document's first line, or of its row, from 1.
        data: the bytes, without the last line end.
        json: whether they are a JSON object rather than the text itself.
        unit: what `line` counts.
        fields: of a row: values by field key, strings as UTF-8.
        problem: what the reader found to be wrong with it; `parse` raises it.
    """

    path: Path
    line: int
    data: bytes
    json: bool
    unit: Literal["line", "row"] = "line"
    fields: Mapping[str, object] = MappingProxyType({})
    problem: str = ""


class ParsedText(NamedTuple):
    """A document's text and, in the order of the field keys, the values of its fields.

    A string stands as it is, a number or boolean as its JSON text, None for a field that is absent
    or null.
    """

    text: str
    fields: tuple[str | None, ...] = ()


class DocumentReader:
    """Raw documents of several files, one after another.

    Attributes:
        paths: the files.
        json_key: key of the text in `.jsonl`, name of its column in `.parquet`.
        field_keys: keys of the fields that `parse` will be asked for.
        sizes: bytes of each file on disk.
        total_bytes: their sum.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        txt_documents: TextDocuments = "line",
        json_key: str = "text",
        field_keys: Sequence[str] = (),
    ) -> None:
        """Check that every file can be opened, has a known kind and, as `.parquet`, the columns.

        Raises:
            DataError: one cannot be used, or pyarrow is missing.
        """
        self.paths = list(paths)
        self.json_key = json_key
        self.field_keys = tuple(field_keys)
        self._txt_documents = txt_documents
        for path in self.paths:
            _kind(path)
        self.sizes = [_size(path) for path in self.paths]
        self.total_bytes = sum(self.sizes)
        for path in self.paths:
            if _kind(path) == ".parquet":
                self._rows_of(path)
        self._finished_bytes = 0
        self._current_bytes: Callable[[], int] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files on disk read so far, for a progress bar."""
        current = self._current_bytes
        return self._finished_bytes + (0 if current is None else current())

    def __iter__(self) -> Iterator[RawDocument]:
        """Raw documents in order.

        Raises:
            DataError: a file cannot be read, or is damaged or cut short.
        """
        for number in range(len(self.paths)):
            yield from self.documents_of(number)

    def documents_of(self, number: int) -> Iterator[RawDocument]:
        """Raw documents of one file, by its place in `paths`; raises as iterating over all does."""
        path, size = self.paths[number], self.sizes[number]
        self._finished_bytes = sum(self.sizes[:number])
        try:
            if _kind(path) == ".parquet":
                yield from self._documents_of_rows(path, size)
            else:
                yield from self._documents_of_lines(path)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise DataError(
                f"{path} is damaged or cut short ({error}); make or copy it again"
            ) from error
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}; check the disk that holds it"
            ) from error
        finally:
            self._current_bytes = None
        self._finished_bytes += size

    def _documents_of_lines(self, path: Path) -> Iterator[RawDocument]:
        with path.open("rb") as file:
            self._current_bytes = file.tell
            lines = _lines(decompressed(file, path.suffix))
            if _kind(path) == ".jsonl":
                for number, line in lines:
                    if line and not line.isspace():
                        yield RawDocument(path, number, line, json=True)
            elif self._txt_documents == "line":
                for number, line in lines:
                    yield RawDocument(path, number, line, json=False)
            else:
                yield from _blocks(path, lines)

    def _documents_of_rows(self, path: Path, size: int) -> Iterator[RawDocument]:
        rows = self._rows_of(path)
        number = 0
        self._current_bytes = lambda: size * number // rows.num_rows
        for number, text, fields in rows:
            problem = f"{self.json_key!r} is null" if text is None else ""
            yield RawDocument(path, number, text or b"", False, "row", fields, problem)

    def _rows_of(self, path: Path) -> ParquetText:
        return ParquetText(path, self.json_key, self.field_keys)


def parse(
    document: RawDocument,
    json_key: str,
    field_keys: Sequence[str] = (),
    normalize: Normalization = "none",
) -> ParsedText:
    """Text and fields of a raw document.

    A key that the object does not have is taken for a path of keys with dots in between, into
    objects inside it. Both sorts of keys are those of the document's reader.

    Raises:
        LineError: invalid UTF-8, broken JSON, no such key, a text that is no string, a field that
            is an object or a list, or half a surrogate pair, which no UTF-8 file can hold.
    """
    if document.problem:
        raise _line_error(document, document.problem)
    if document.json and not field_keys and normalize == "none":
        quick = _quick_text(document.data, json_key)
        if quick is not None:
            return ParsedText(quick)
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
    if normalize == "nfkc":
        # Text that is normalized already is found out in one quick pass, and given back.
        text = unicodedata.normalize("NFKC", text)
    return ParsedText(text, fields)


def _quick_text(data: bytes, json_key: str) -> str | None:
    """The text of a line that has one; None where the slower way is to say what is wrong with it.

    orjson is several times as fast as json, but takes less (no NaN) and says less of what it finds.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    text = value.get(json_key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None


def find_value(values: Mapping[str, Any], key: str) -> Any:
    """Value of a key, or of a path `key.key` into objects inside; None where there is none."""
    if key in values:
        return values[key]
    name, _, rest = key.partition(".")
    inner = values.get(name) if rest else None
    return find_value(inner, rest) if isinstance(inner, dict) else None


def _decode(document: RawDocument) -> str:
    try:
        return document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        # Offsets count from the document's start, which for a block is not the line's.
        lines = document.data[: error.start].count(b"\n") if document.unit == "line" else 0
        problem = f"invalid UTF-8 ({error.reason})"
        raise _line_error(document, problem, document.line + lines) from error


def _json_object(document: RawDocument, decoded: str) -> dict[str, Any]:
    try:
        value = json.loads(decoded)
    # Beside JSONDecodeError: a number of more digits than Python converts, brackets too deep.
    except (ValueError, RecursionError) as error:
        raise _line_error(document, f"broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise _line_error(document, "not a JSON object")
    return value


def _json_text(document: RawDocument, values: Mapping[str, Any], json_key: str) -> str:
    text = find_value(values, json_key)
    if isinstance(text, str):
        return text
    if text is None and json_key not in values:
        keys = ", ".join(repr(key) for key in list(values)[:8]) or "none"
        raise _line_error(document, f"no key {json_key!r} (keys here: {keys}); see --json-key")
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


def iterate_documents(reader: DocumentReader, on_error: OnError = "fail") -> Iterator[str]:
    """Text of each document of a reader; lines that cannot be used are left out or end it.

    Those left out are reported in the log.

    Raises:
        DataError: as `DocumentReader`, and as `parse` unless `on_error` is `skip`.
    """
    skipped = 0
    for document in reader:
        try:
            text = parse(document, reader.json_key).text
        except LineError as error:
            if on_error == "fail":
                raise
            report_skipped(error, skipped)
            skipped += 1
        else:
            yield text
    if skipped:
        logger.warning("left out %d lines that cannot be used", skipped)


def report_skipped(error: LineError, skipped_before: int) -> None:
    """Log a line that is left out, unless so many were before it that it would drown the log."""
    if skipped_before < _SKIPS_SHOWN:
        logger.warning("skipped: %s", error)


def _line_error(document: RawDocument, problem: str, line: int | None = None) -> LineError:
    unit = document.unit
    return LineError(
        f"{document.path}, {unit} {line or document.line}: {problem}; "
        f"mend the {unit}, or leave such {unit}s out with --on-error skip"
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(path: Path) -> str:
    name = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if name.suffix not in (".jsonl", ".txt") and path.suffix != ".parquet":
        raise DataError(
            f"{path}: unknown kind of text file; expected .jsonl or .txt, or either with .gz or "
            f".zst, or .parquet"
        )
    return name.suffix


def _size(path: Path) -> int:
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the --input paths")
        # Whoever may not read it is told now, not after hours of work on the files before it.
        with path.open("rb"):
            return path.stat().st_size
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; check the --input paths and who may read them"
        ) from error


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _blocks(path: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[RawDocument]:
    block: list[bytes] = []
    first = 0
    for number, line in lines:
        if line and not line.isspace():
            first = first if block else number
            block.append(line)
        elif block:
            yield RawDocument(path, first, b"\n".join(block), json=False)
            block = []
    if block:
        yield RawDocument(path, first, b"\n".join(block), json=False)
