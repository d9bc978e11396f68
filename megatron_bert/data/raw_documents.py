"""Documents as they are in a file: bytes and line numbers, before they are parsed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal, NamedTuple

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RawDocument(NamedTuple):
    """The bytes of one document as they are in the file.

    Attributes:
        path: the file.
        line: number of the document's first line, or of its row, from 1.
        data: the bytes, without the last line end.
        json: whether they are a JSON object rather than the text itself.
        unit: what `line` counts.
        fields: for a row, the values by field key, strings as UTF-8.
        problem: an error that the reader found; `parse` raises it.
    """

    path: Path
    line: int
    data: bytes
    json: bool
    unit: Literal["line", "row"] = "line"
    fields: Mapping[str, object] = MappingProxyType({})
    problem: str = ""


@dataclass(frozen=True)
class RawLines:
    """Lines of which each is a document, in one object instead of thousands.

    Has the length and the iterator of a list of `RawDocument`.

    Attributes:
        path: the file.
        first: number of the first line, from 1.
        lines: the bytes of each, without the line feed.
        json: whether they are JSON objects rather than texts; blank lines then are no documents.
    """

    path: Path
    first: int
    lines: list[bytes]
    json: bool

    def __len__(self) -> int:
        if not self.json:
            return len(self.lines)
        return len(self.lines) - self.lines.count(b"") - sum(map(bytes.isspace, self.lines))

    def __iter__(self) -> Iterator[RawDocument]:
        for number, line in enumerate(self.lines, self.first):
            if not self.json or (line and not line.isspace()):
                yield RawDocument(self.path, number, line.removesuffix(b"\r"), self.json)


def read_lines(path: Path, stream: BinaryIO, batch_bytes: int, *, json: bool) -> Iterator[RawLines]:
    """Yield all lines of a file, read from `stream`, in batches of about `batch_bytes` bytes."""
    first = 1
    waiting: list[bytes] = []
    is_over = False
    while not is_over:
        block = stream.read(batch_bytes)
        is_over = not block
        end = block.rfind(b"\n")
        if end < 0 and not is_over:
            waiting.append(block)
            continue
        data = b"".join([*waiting, block[: max(0, end)]])
        if first == 1:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        waiting = [block[end + 1 :]]
        # What follows the last line feed is a line too, unless it is empty.
        if data or not is_over:
            lines = data.split(b"\n")
            yield RawLines(path, first, lines, json)
            first += len(lines)


def read_blocks(path: Path, stream: BinaryIO, batch_bytes: int) -> Iterator[RawDocument]:
    """Yield a file's blocks of lines, ended by blank lines, with line feeds between their lines."""
    block: list[bytes] = []
    first = 0
    for lines in read_lines(path, stream, batch_bytes, json=False):
        for line in lines:
            if line.data and not line.data.isspace():
                first = first if block else line.line
                block.append(line.data)
            elif block:
                yield RawDocument(path, first, b"\n".join(block), json=False)
                block = []
    if block:
        yield RawDocument(path, first, b"\n".join(block), json=False)


RawBatch = RawLines | list[RawDocument]
"""Some consecutive documents of a file."""


def in_batches(
    documents: Iterator[RawDocument], batch_bytes: int, batch_documents: int
) -> Iterator[list[RawDocument]]:
    """Group documents into batches; a batch ends with the document that reaches a limit."""
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= batch_bytes or len(batch) >= batch_documents:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
