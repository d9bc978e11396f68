"""Documents from text files: `.jsonl` and `.txt`, also compressed (`.gz`, `.zst`), and `.parquet`.

Reading is split in two, so that a reader can stay ahead of the threads that parse: a
`DocumentReader` yields raw documents in file order with their line numbers, and `parsing` turns
them into texts.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import zstandard

from megatron_bert.command_line.arguments import argument
from megatron_bert.data.decompression import decompressed
from megatron_bert.data.parquet_text import ParquetText
from megatron_bert.data.parsing import LineError, OnError, parse
from megatron_bert.data.raw_documents import (
    RawBatch,
    RawDocument,
    in_batches,
    read_blocks,
    read_lines,
)
from megatron_bert.data.shards import check_given_once
from megatron_bert.errors import DataError
from megatron_bert.words import counted

logger = logging.getLogger(__name__)

TextDocuments = Literal["line", "blank-line"]
"""What a document is in a `.txt` file: a line, or a block of lines ended by blank lines."""

_BATCH_BYTES = 1 << 18
_BATCH_DOCUMENTS = 4096
_SKIPS_SHOWN = 20


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
        """Check that all files can be opened, have a known kind and, if `.parquet`, the columns.

        Raises:
            DataError: a file cannot be used or is given twice, or pyarrow is missing.
        """
        self.paths = list(paths)
        check_given_once(self.paths)
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
            for batch in self.batches_of(number):
                yield from batch

    def batches_of(
        self, number: int, batch_bytes: int = _BATCH_BYTES, batch_documents: int = _BATCH_DOCUMENTS
    ) -> Iterator[RawBatch]:
        """Yield the raw documents of one file, by its index in `paths`, in batches.

        A batch of lines has about `batch_bytes`; a batch of other documents ends with the document
        that reaches a limit. Raises the same errors as iterating over all documents.
        """
        path, size = self.paths[number], self.sizes[number]
        self._finished_bytes = sum(self.sizes[:number])
        try:
            if _kind(path) == ".parquet":
                documents = self._documents_of_rows(path, size)
                yield from in_batches(documents, batch_bytes, batch_documents)
            else:
                yield from self._batches_of_lines(path, batch_bytes, batch_documents)
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

    def _batches_of_lines(
        self, path: Path, batch_bytes: int, batch_documents: int
    ) -> Iterator[RawBatch]:
        is_json = _kind(path) == ".jsonl"
        with path.open("rb") as file:
            self._current_bytes = file.tell
            stream = decompressed(file, path.suffix)
            if is_json or self._txt_documents == "line":
                yield from read_lines(path, stream, batch_bytes, json=is_json)
            else:
                blocks = read_blocks(path, stream, batch_bytes)
                yield from in_batches(blocks, batch_bytes, batch_documents)

    def _documents_of_rows(self, path: Path, size: int) -> Iterator[RawDocument]:
        rows = self._rows_of(path)
        number = 0
        self._current_bytes = lambda: size * number // rows.num_rows
        for number, text, fields in rows:
            problem = f"{self.json_key!r} is null" if text is None else ""
            yield RawDocument(path, number, text or b"", False, "row", fields, problem)

    def _rows_of(self, path: Path) -> ParquetText:
        return ParquetText(path, self.json_key, self.field_keys)


def iterate_documents(reader: DocumentReader, on_error: OnError = "fail") -> Iterator[str]:
    """Yield the texts of a reader's documents; skip or fail at lines that cannot be used.

    Skipped lines are reported in the log.

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
        logger.warning("left out %s that cannot be used", counted(skipped, "line"))


def report_skipped(error: LineError, skipped_before: int) -> None:
    """Log a skipped line, unless so many came before it that they would flood the log."""
    if skipped_before < _SKIPS_SHOWN:
        logger.warning("skipped: %s", error.problem)


def _kind(path: Path) -> str:
    name = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if path.is_dir():
        raise DataError(f"{path}: a folder; name the files in it, as {path}/*.jsonl")
    if name.suffix not in (".jsonl", ".txt") and path.suffix != ".parquet":
        raise DataError(
            f"{path}: unknown kind of text file; give .jsonl or .txt, either with .gz or .zst "
            f"too, or .parquet"
        )
    return name.suffix


def _size(path: Path) -> int:
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check {argument('inputs')}")
        # Opened so that missing permission shows now, not after hours of work on earlier files.
        with path.open("rb"):
            return path.stat().st_size
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; check {argument('inputs')} "
            "and who may read them"
        ) from error
