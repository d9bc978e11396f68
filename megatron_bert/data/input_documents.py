"""The documents of one job, starting anywhere in its input, and the checksums of its files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_bert.closeable import Closeable
from megatron_bert.command_line.arguments import argument
from megatron_bert.data.raw_documents import RawBatch
from megatron_bert.data.shards import Shard, check_given_once
from megatron_bert.data.text import DocumentReader, TextDocuments
from megatron_bert.errors import DataError

_HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Position:
    """A place between two documents of an input.

    Attributes:
        file: number of the file, from 0.
        documents: how many of its documents come before the place, including other shards'.
        documents_of_files: how many documents the files before that file have.
    """

    file: int = 0
    documents: int = 0
    documents_of_files: int = 0

    @property
    def num_begun(self) -> int:
        """How many files were begun: all before `file`, and `file` if `documents` is not 0."""
        return self.file + (self.documents > 0)


class InputDocuments:
    """The documents of some files, or one shard's share of them.

    If there is at least one file for each shard, shard K of N gets whole files: the Kth of N
    contiguous blocks. Otherwise it gets the documents whose running number is K modulo N.

    Attributes:
        reader: reads the files from which this job takes documents.
        part: "K/N" if the shard gets single documents; None if it gets whole files.
        shard_set: `DatasetInfo.shard_set`.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        txt_documents: TextDocuments,
        json_key: str,
        field_keys: Sequence[str],
        shard: Shard | None = None,
    ) -> None:
        """Check the job's files; raises what `DocumentReader` raises."""
        all_inputs = inputs
        check_given_once(all_inputs)
        self.part: str | None = None
        self._number, self._count = 0, 1
        if shard is not None and len(inputs) >= shard.count:
            inputs = inputs[shard.block(len(inputs))]
        elif shard is not None:
            self.part = str(shard)
            self._number, self._count = shard.number, shard.count
        self.reader = DocumentReader(inputs, txt_documents, json_key, field_keys)
        self._stamps = [_stamp(path) for path in self.reader.paths]
        self.shard_set = None if shard is None else self._shard_set(shard, all_inputs)

    def identity(self) -> dict[str, str]:
        """Name each file; `stamps` tell whether a file is still the same."""
        return {f"input {number}": str(path) for number, path in enumerate(self.reader.paths)}

    def stamps(self, position: Position) -> list[str]:
        """Describe the files begun before a position, as they were when the job began."""
        return [
            f"of {size:,} bytes modified at {nanoseconds / 1e9:.9f}"
            for size, nanoseconds in self._stamps[: position.num_begun]
        ]

    def check_same(self, position: Position, stamps: Sequence[str]) -> None:
        """Compare the files begun before a position with what `stamps` gave in an earlier job.

        Raises:
            DataError: one has changed. Files that were not begun yet may have changed.
        """
        for path, earlier, now in zip(
            self.reader.paths, stamps, self.stamps(position), strict=False
        ):
            if earlier != now:
                raise DataError(
                    f"{path} was {earlier} when it was read and is now {now}; restore it, or begin "
                    f"anew with {argument('restart', True)}"
                )

    def batches_from(
        self, start: Position, batch_bytes: int, batch_documents: int
    ) -> Iterator[tuple[RawBatch, Position]]:
        """Yield the documents from a place on in batches, each with the place after it.

        The limits and errors are those of `DocumentReader.batches_of`.
        """
        before = start.documents_of_files
        for file in range(start.file, len(self.reader.paths)):
            done = start.documents if file == start.file else 0
            number = 0
            for batch in self.reader.batches_of(file, batch_bytes, batch_documents):
                first, number = number, number + len(batch)
                if number > done:
                    yield (
                        self._share_of(batch, done - first, before + first),
                        Position(file, number, before),
                    )
            before += number

    def _share_of(self, batch: RawBatch, num_done: int, number: int) -> RawBatch:
        """Drop the first `num_done` documents of a batch, and those of other shards.

        `number` is the running number of the batch's first document in the whole input.
        """
        if num_done <= 0 and self._count == 1:
            return batch
        return [
            document
            for k, document in enumerate(batch)
            if k >= num_done and (number + k) % self._count == self._number
        ]

    def _shard_set(self, shard: Shard, inputs: Sequence[Path]) -> str:
        # Sizes matter only where shards share files; otherwise a file concerns one shard alone.
        sizes = self.reader.sizes if self.part is not None else []
        content = [shard.count, [str(path) for path in inputs], sizes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise `DataError` if a file changed since the job began."""
        for path, stamp in zip(self.reader.paths, self._stamps, strict=True):
            if _stamp(path) != stamp:
                raise DataError(
                    f"{path} changed while it was read; begin anew with {argument('restart', True)}"
                )


class FileHashes(Closeable):
    """SHA-256 of files, computed by a separate thread while the files are read.

    Used as a context manager: hashes not finished at its end are abandoned.
    """

    def __init__(self, paths: Sequence[Path], known: Sequence[str] = ()) -> None:
        """Take over the known hashes, which are those of the first files."""
        self._paths = list(paths)
        self._known = list(known)
        self._pending: deque[Future[str]] = deque()
        self._thread = ThreadPoolExecutor(1, "hash")
        self._stop = threading.Event()

    def computed(self, file: int) -> list[str]:
        """Begin all files up to number `file`; return the hashes, in hex, of the first ones done.

        Raises:
            DataError: a file cannot be read.
        """
        for path in self._paths[len(self._known) + len(self._pending) : file + 1]:
            self._pending.append(self._thread.submit(self._hash, path))
        while self._pending and self._pending[0].done():
            self._known.append(self._pending.popleft().result())
        return list(self._known)

    def all(self) -> list[str]:
        """Wait for all hashes; raises what `computed` raises."""
        self.computed(len(self._paths))
        while self._pending:
            self._known.append(self._pending.popleft().result())
        return list(self._known)

    def close(self) -> None:
        """Abandon the hashes that are not finished."""
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def _hash(self, path: Path) -> str:
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while (block := file.read(_HASHED_BYTES)) and not self._stop.is_set():
                    digest.update(block)
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}; check the disk that holds it"
            ) from error
        return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; an input must stay where it is until the "
            f"dataset is made: put it back"
        ) from error
    return status.st_size, status.st_mtime_ns
