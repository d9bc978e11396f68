"""Text files into an indexed dataset: the work behind tools/preprocess_data.py.

The calling thread reads and writes in file order; worker threads parse and tokenize batches of
documents. Threads suffice: both tokenizer libraries work without the GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from _megatron_bert_core import IndexedDatasetWriter

from megatron_bert.config.errors import DataError
from megatron_bert.data.indexed_dataset import DatasetInfo, SourceFile, write_dataset_info
from megatron_bert.data.progress import Progress
from megatron_bert.data.text import (
    DocumentReader,
    LineError,
    OnError,
    RawDocument,
    TextDocuments,
    parse,
    report_skipped,
)
from megatron_bert.data.tokenizer import Tokenizer

# Megatron-LM's rule (`DType.optimal_dtype`).
_UINT16_VOCABULARY = 65_500

# Small enough that a few long documents keep every worker busy, large enough (some 60,000 tokens)
# that handing a batch over costs nothing beside encoding it.
_BATCH_BYTES = 1 << 18
_BATCH_DOCUMENTS = 4096
_BATCHES_PER_WORKER = 4


@dataclass(frozen=True)
class PreprocessOptions:
    """What to turn into which dataset, and how.

    Attributes:
        inputs: text files, read in this order.
        tokenizer: the tokenizer's file.
        output_prefix: P of `P.bin`, `P.idx` and `P.json`.
        json_key: key of the text in `.jsonl`.
        txt_documents: what a document is in `.txt`.
        workers: number of tokenizing threads.
        on_error: what happens at a line that cannot be used.
        overwrite: whether an existing dataset is replaced.
    """

    inputs: Sequence[Path]
    tokenizer: Path
    output_prefix: Path
    json_key: str = "text"
    txt_documents: TextDocuments = "line"
    workers: int = 1
    on_error: OnError = "fail"
    overwrite: bool = False


@dataclass
class PreprocessCounts:
    """What went into a dataset and what did not."""

    documents: int = 0
    tokens: int = 0
    skipped_lines: int = 0
    empty_documents: int = 0


@dataclass
class _EncodedBatch:
    """Tokens of some documents, int32 `[sum(lengths)]`, and what was left out."""

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    empty: int = 0
    skipped: list[LineError] = field(default_factory=list)


def preprocess(options: PreprocessOptions) -> PreprocessCounts:
    """Tokenize text files into `P.bin` and `P.idx`, with `P.json` beside them.

    One document of text becomes one document of one sequence, without special tokens. Documents
    keep the order of the input, whatever the number of workers. Memory is bounded by a few
    batches a worker and the lengths of all documents.

    Raises:
        DataError: an input, the tokenizer or the output cannot be used, a line cannot be used
            (unless `on_error` is `skip`), or no input holds a token. Nothing is left behind then.
    """
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: give at least 1")
    reader = DocumentReader(options.inputs, options.txt_documents, options.json_key)
    tokenizer = Tokenizer.load(options.tokenizer)
    outputs = _check_outputs(options)
    writer = _open_writer(options.output_prefix, tokenizer)
    counts = PreprocessCounts()
    try:
        with (
            Progress("tokenizing", reader.total_bytes) as progress,
            closing(_encoded_batches(reader, tokenizer, options)) as batches,
        ):
            for batch in batches:
                writer.add_documents(batch.tokens, batch.lengths)
                _count(counts, batch)
                progress.show(reader.bytes_read, f"{counts.tokens / 1e6:.1f} M tokens")
        _check_not_empty(counts)
        # A full disk shows here, before an old dataset is touched.
        writer.finish()
        _remove_old_dataset(outputs)
        write_dataset_info(str(options.output_prefix), _info(counts, reader, tokenizer))
        # A dataset is there once its .idx is, which close() writes last.
        writer.close()
    except BaseException as error:
        # The traceback keeps this frame alive, and the writer removes its files only when it goes.
        del writer
        if not outputs.index_file.exists():
            outputs.sidecar_file.unlink(missing_ok=True)
        if isinstance(error, RuntimeError | OSError):
            raise DataError(f"cannot make dataset {options.output_prefix}: {error}") from error
        raise
    return counts


class _Outputs(NamedTuple):
    index_file: Path
    tokens_file: Path
    sidecar_file: Path


def _check_outputs(options: PreprocessOptions) -> _Outputs:
    """Refuse to replace a dataset unasked, and make the folder."""
    prefix = options.output_prefix
    if not prefix.name:
        raise DataError(f"--output-prefix {prefix}: give a name, as data/train")
    if prefix.suffix in (".bin", ".idx", ".json"):
        raise DataError(f"--output-prefix {prefix}: leave off {prefix.suffix}; it is added")
    outputs = _Outputs(
        *(prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin", ".json"))
    )
    try:
        existing = [str(path) for path in outputs if path.exists()]
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--output-prefix {prefix}: cannot make {error.filename}: {error.strerror}; choose "
            f"another"
        ) from error
    if existing and not options.overwrite:
        raise DataError(
            f"{', '.join(existing)} already there; choose another --output-prefix, or replace "
            f"the dataset with --overwrite"
        )
    return outputs


def _open_writer(prefix: Path, tokenizer: Tokenizer) -> IndexedDatasetWriter:
    token_bytes = 2 if tokenizer.vocab_size < _UINT16_VOCABULARY else 4
    try:
        return IndexedDatasetWriter(str(prefix), token_bytes)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"cannot write dataset {prefix}: {error}; choose another --output-prefix"
        ) from error


def _encoded_batches(
    documents: Iterable[RawDocument], tokenizer: Tokenizer, options: PreprocessOptions
) -> Generator[_EncodedBatch, None, None]:
    """Batches in input order; reading goes on while workers encode, a few batches ahead."""
    pending: deque[Future[_EncodedBatch]] = deque()
    with ThreadPoolExecutor(options.workers, "tokenize") as workers:
        try:
            for batch in _batches(documents):
                pending.append(workers.submit(_encode, tokenizer, batch, options))
                if len(pending) >= _BATCHES_PER_WORKER * options.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    tokenizer: Tokenizer, batch: list[RawDocument], options: PreprocessOptions
) -> _EncodedBatch:
    texts: list[str] = []
    skipped: list[LineError] = []
    for document in batch:
        try:
            texts.append(parse(document, options.json_key).text)
        except LineError as error:
            if options.on_error == "fail":
                raise
            skipped.append(error)
    ids, lengths = tokenizer.encode(texts)
    has_tokens = lengths > 0
    return _EncodedBatch(
        tokens=ids,
        lengths=lengths[has_tokens],
        empty=len(texts) - int(has_tokens.sum()),
        skipped=skipped,
    )


def _count(counts: PreprocessCounts, batch: _EncodedBatch) -> None:
    for error in batch.skipped:
        report_skipped(error, counts.skipped_lines)
        counts.skipped_lines += 1
    counts.documents += len(batch.lengths)
    counts.tokens += len(batch.tokens)
    counts.empty_documents += batch.empty


def _check_not_empty(counts: PreprocessCounts) -> None:
    if not counts.tokens:
        raise DataError(
            f"the input holds no token ({counts.empty_documents} empty documents, "
            f"{counts.skipped_lines} skipped lines); give files with text"
        )


def _remove_old_dataset(outputs: _Outputs) -> None:
    # The index goes first: an old one must never stand beside new tokens.
    for path in outputs:
        path.unlink(missing_ok=True)


def _info(counts: PreprocessCounts, reader: DocumentReader, tokenizer: Tokenizer) -> DatasetInfo:
    return DatasetInfo(
        tokenizer_hash=tokenizer.hash,
        tokenizer_name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        documents=counts.documents,
        tokens=counts.tokens,
        skipped_lines=counts.skipped_lines,
        empty_documents=counts.empty_documents,
        sources=tuple(
            SourceFile(str(path), size)
            for path, size in zip(reader.paths, reader.sizes, strict=True)
        ),
    )
