"""Documents out of text files: `.jsonl` and `.txt`, plain or packed as `.gz` or `.zst`.

Reading is split in two, so that a reader can stay ahead of the threads that parse: a
`DocumentReader` yields raw documents in file order with their line numbers, `parse` turns one
into text.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import zstandard

from megatron_bert.config.errors import DataError

logger = logging.getLogger(__name__)

TextDocuments = Literal["line", "blank-line"]
"""What a document is in a `.txt` file: a line, or a block of lines ended by blank lines."""

OnError = Literal["skip", "fail"]
"""What happens at a line that cannot be used: it is left out and counted, or the work ends."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 20
_SKIPS_SHOWN = 20


class LineError(DataError):
    """One line of a text file cannot be used; the message names file, line number and remedy."""


@dataclass(frozen=True)
class RawDocument:
    """Bytes of one document as they stand in the file.

    Attributes:
        path: the file.
        line: number of the document's first line, from 1.
        data: the bytes, without the last line end.
        json: whether they are a JSON object rather than the text itself.
    """

    path: Path
    line: int
    data: bytes
    json: bool


class DocumentReader:
    """Raw documents of several files, one after another.

    Attributes:
        paths: the files.
        sizes: bytes of each on disk.
        total_bytes: their sum.
    """

    def __init__(self, paths: Sequence[Path], txt_documents: TextDocuments = "line") -> None:
        """Check that every file can be opened and has a known kind; `DataError` otherwise."""
        self.paths = list(paths)
        self._txt_documents = txt_documents
        for path in self.paths:
            _kind(path)
        self.sizes = [_size(path) for path in self.paths]
        self.total_bytes = sum(self.sizes)
        self._finished_bytes = 0
        self._current: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files on disk read so far, for a progress bar."""
        current = self._current
        return self._finished_bytes + (0 if current is None else current.tell())

    def __iter__(self) -> Iterator[RawDocument]:
        """Raw documents in order.

        Raises:
            DataError: a file cannot be read, or its compressed stream is damaged or cut short.
        """
        self._finished_bytes = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            try:
                yield from self._documents_of(path)
            except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
                raise DataError(
                    f"{path} is damaged or cut short ({error}); make or copy it again"
                ) from error
            except OSError as error:
                raise DataError(
                    f"cannot read {path}: {error.strerror or error}; check the disk that holds it"
                ) from error
            self._finished_bytes += size

    def _documents_of(self, path: Path) -> Iterator[RawDocument]:
        with path.open("rb") as file:
            self._current = file
            try:
                lines = _lines(_decompressed(file, path.suffix))
                if _kind(path) == ".jsonl":
                    for number, line in lines:
                        if line and not line.isspace():
                            yield RawDocument(path, number, line, json=True)
                elif self._txt_documents == "line":
                    for number, line in lines:
                        yield RawDocument(path, number, line, json=False)
                else:
                    yield from _blocks(path, lines)
            finally:
                self._current = None


def parse(document: RawDocument, json_key: str) -> str:
    """Text of a raw document.

    Raises:
        LineError: invalid UTF-8, broken JSON, no such key, a value that is no string, or a text
            with half a surrogate pair, which no UTF-8 file can hold.
    """
    try:
        decoded = document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        # Offsets count from the document's start, which for a block is not the line's.
        line = document.line + document.data[: error.start].count(b"\n")
        raise _line_error(document, f"invalid UTF-8 ({error.reason})", line) from error
    if not document.json:
        return decoded
    try:
        value = json.loads(decoded)
    # Beside JSONDecodeError: a number of more digits than Python converts, brackets too deep.
    except (ValueError, RecursionError) as error:
        raise _line_error(document, f"broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise _line_error(document, "not a JSON object")
    if json_key not in value:
        keys = ", ".join(repr(key) for key in list(value)[:8]) or "none"
        raise _line_error(document, f"no key {json_key!r} (keys here: {keys}); see --json-key")
    text = value[json_key]
    if not isinstance(text, str):
        raise _line_error(document, f"{json_key!r} is not a string but {type(text).__name__}")
    # Only an escape can bring in a lone surrogate: decoded UTF-8 has none.
    if b"\\u" in document.data and not _is_encodable(text):
        raise _line_error(document, f"{json_key!r} holds half a surrogate pair")
    return text


def iterate_documents(
    reader: DocumentReader, json_key: str = "text", on_error: OnError = "fail"
) -> Iterator[str]:
    """Text of each document of a reader; lines that cannot be used are left out or end it.

    Those left out are reported in the log.

    Raises:
        DataError: as `DocumentReader`, and as `parse` unless `on_error` is `skip`.
    """
    skipped = 0
    for document in reader:
        try:
            text = parse(document, json_key)
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
    return LineError(
        f"{document.path}, line {line or document.line}: {problem}; "
        f"mend the line, or leave such lines out with --on-error skip"
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(path: Path) -> str:
    name = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if name.suffix not in (".jsonl", ".txt"):
        raise DataError(
            f"{path}: unknown kind of text file; expected .jsonl or .txt, or either with .gz or "
            f".zst"
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


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstandardReader(file), _READ_BYTES))
    return file


class _ZstandardReader(io.RawIOBase):
    """All frames of a zstd stream; zstandard's own reader takes a cut stream for its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # Files packed with `zstd --long=31` need the format's largest window.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._pending = memoryview(b"")
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            chunk = b""
            if self._frame.eof:
                chunk = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._inside_frame = False
            chunk = chunk or self._file.read(zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE)
            if not chunk:
                if self._inside_frame:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._inside_frame = True
            self._pending = memoryview(self._frame.decompress(chunk))
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count


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
