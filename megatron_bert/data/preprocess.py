"""Text files into an indexed dataset: the work behind tools/preprocess_data.py.

The calling thread reads and writes in file order; worker threads parse and tokenize batches of
documents. Threads suffice: both tokenizer libraries work without the GIL.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.config.errors import DataError
from megatron_bert.data.dataset_writer import DatasetWriter
from megatron_bert.data.deduplication import Deduplicator
from megatron_bert.data.dictionary_words import Dictionary, WordFinder
from megatron_bert.data.encoding import EncodedBatch, Encoder
from megatron_bert.data.field_counts import FieldCounts
from megatron_bert.data.indexed_dataset import DatasetInfo, SourceFile
from megatron_bert.data.input_documents import FileHashes, InputDocuments, Position
from megatron_bert.data.parsing import Normalization, OnError
from megatron_bert.data.placing import check_name
from megatron_bert.data.progress import Progress
from megatron_bert.data.raw_documents import RawBatch
from megatron_bert.data.shards import Shard
from megatron_bert.data.text import TextDocuments, report_skipped
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.files import StrPath
from megatron_bert.words import rounded

logger = logging.getLogger(__name__)

# Small enough that a few long documents keep every worker busy, large enough (some 60,000 tokens)
# that handing a batch over costs nothing beside encoding it.
_BATCH_BYTES = 1 << 18
_BATCH_DOCUMENTS = 4096
_BATCHES_PER_WORKER = 4

_HASHES = "hashes"


@dataclass(frozen=True)
class PreprocessOptions:
    """What to turn into which dataset, and how.

    Attributes:
        inputs: text files, read in this order, or a single one.
        tokenizer: the tokenizer's file.
        output_prefix: P of `P.bin`, `P.idx` and `P.json`.
        json_key: key of the text in `.jsonl`, its column in `.parquet`.
        field_keys: keys of the fields by whose values documents and tokens are counted.
        normalize: the form that text is brought into before anything else.
        deduplicate: whether a document is left out if its text was there before.
        txt_documents: what a document is in `.txt`.
        word_boundaries: the dictionary that finds the words of `P.words`; None: there is none.
        shard: which part of the input to take, into `P-00000-of-00008` and so on; None: all.
        workers: number of tokenizing threads.
        on_error: what happens at a line that cannot be used.
        overwrite: whether an existing dataset is replaced.
        restart: whether what an earlier job has done of this is thrown away.
    """

    inputs: StrPath | Sequence[StrPath]
    tokenizer: StrPath
    output_prefix: StrPath
    json_key: str = "text"
    field_keys: Sequence[str] = ()
    normalize: Normalization = "none"
    deduplicate: bool = False
    txt_documents: TextDocuments = "line"
    word_boundaries: Dictionary | None = None
    shard: Shard | None = None
    workers: int = 1
    on_error: OnError = "fail"
    overwrite: bool = False
    restart: bool = False

    @property
    def input_files(self) -> list[Path]:
        """The text files."""
        inputs = self.inputs
        return [Path(p) for p in ([inputs] if isinstance(inputs, str | PathLike) else inputs)]

    @property
    def dataset_prefix(self) -> Path:
        """P, or that of the shard."""
        prefix = Path(self.output_prefix)
        return prefix if self.shard is None else self.shard.prefix(prefix)


@dataclass
class PreprocessCounts:
    """What went into a dataset and what did not."""

    documents: int = 0
    tokens: int = 0
    skipped_lines: int = 0
    empty_documents: int = 0
    duplicate_documents: int = 0


@dataclass
class _State:
    """How far the work is: what a commit notes, and a later job goes on from."""

    position: Position
    counts: PreprocessCounts
    fields: FieldCounts
    sha256: list[str]

    @classmethod
    def of_note(
        cls, note: Mapping[str, Any] | None, field_keys: Sequence[str], inputs: InputDocuments
    ) -> _State:
        if note is None:
            return cls(Position(), PreprocessCounts(), FieldCounts(field_keys), [])
        position = Position(**note["position"])
        inputs.check_same(position, note["stamps"])
        return cls(
            position,
            PreprocessCounts(**note["counts"]),
            FieldCounts.from_json(note["fields"]),
            # Files that were not begun may have been replaced.
            note["sha256"][: position.num_begun],
        )

    def note(self, inputs: InputDocuments) -> dict[str, Any]:
        return {
            "stamps": inputs.stamps(self.position),
            "position": asdict(self.position),
            "counts": asdict(self.counts),
            "fields": self.fields.to_json(),
            "sha256": self.sha256,
        }

    def add(self, batch: EncodedBatch, end: Position) -> None:
        for error in batch.skipped:
            report_skipped(error, self.counts.skipped_lines)
            self.counts.skipped_lines += 1
        self.counts.documents += len(batch.lengths_N)
        self.counts.tokens += len(batch.tokens_T)
        self.counts.empty_documents += batch.empty
        self.counts.duplicate_documents += batch.duplicates
        if any(batch.fields_N):
            for values, length in zip(batch.fields_N, batch.lengths_N.tolist(), strict=True):
                self.fields.add(values, length)
        self.position = end


def preprocess(options: PreprocessOptions) -> PreprocessCounts:
    """Tokenize text files into `P.bin` and `P.idx`, with `P.json` (and `P.words`) beside them.

    One document of text becomes one document of one sequence, without special tokens. Documents
    keep the order of the input, whatever the number of workers. Memory is bounded by a few
    batches a worker. What a job that was killed or failed has done is kept in `P.partial`; the
    same call goes on from there, and the files are those of a job that was not interrupted.

    Raises:
        DataError: an input, the tokenizer or the output cannot be used, a line cannot be used
            (unless `on_error` is `skip`), no input holds a token, or `P.partial` is in use or is
            another call's. An existing dataset is as it was then.
    """
    _check(options)
    inputs = InputDocuments(
        options.input_files,
        options.txt_documents,
        options.json_key,
        options.field_keys,
        options.shard,
    )
    tokenizer = Tokenizer.load(options.tokenizer)
    words = None if options.word_boundaries is None else WordFinder(options.word_boundaries)
    encoder = Encoder(
        tokenizer=tokenizer,
        json_key=options.json_key,
        field_keys=options.field_keys,
        normalize=options.normalize,
        deduplicate=options.deduplicate,
        on_error=options.on_error,
        words=words,
    )
    prefix = options.dataset_prefix
    try:
        with DatasetWriter(
            prefix,
            tokenizer.vocab_size,
            identity=_identity(options, inputs, encoder),
            lists=[_HASHES],
            overwrite=options.overwrite,
            restart=options.restart,
        ) as writer:
            state = _State.of_note(writer.note, options.field_keys, inputs)
            if writer.note is not None:
                logger.warning("goes on behind %s documents", f"{state.counts.documents:,}")
            if writer.is_placing:
                writer.place()
            else:
                _write_documents(writer, state, options, inputs, encoder)
                writer.finish(state.note(inputs), _info(state, inputs, encoder))
            _warn(state, options, inputs)
            return state.counts
    except OSError as error:
        raise DataError(
            f"cannot make dataset {prefix}: {error}; see to it and try again"
        ) from error


def _check(options: PreprocessOptions) -> None:
    if options.workers < 1:
        raise DataError(f"workers = {options.workers} (--workers): give at least 1")
    check_name(Path(options.output_prefix))
    if isinstance(options.field_keys, str):
        raise DataError(f"field_keys = {options.field_keys!r}: a bare text; give a list of keys")
    twice = sorted(key for key, times in Counter(options.field_keys).items() if times > 1)
    if twice:
        raise DataError(
            f"field_keys {' '.join(twice)} (--field-key): given twice; give each key once"
        )


def _warn(state: _State, options: PreprocessOptions, inputs: InputDocuments) -> None:
    """Say what may not be what was meant."""
    for key in state.fields.keys_without_values():
        logger.warning("no document has the field %r; see --field-key", key)
    if options.deduplicate and inputs.part is not None:
        logger.warning(
            "shards share files, and a duplicate is found only within a shard; to find them all, "
            "preprocess in one job, or divide the files beforehand"
        )


def _write_documents(
    writer: DatasetWriter,
    state: _State,
    options: PreprocessOptions,
    inputs: InputDocuments,
    encoder: Encoder,
) -> None:
    reader = inputs.reader
    raw_batches = inputs.batches_from(state.position, _BATCH_BYTES, _BATCH_DOCUMENTS)
    deduplicator = Deduplicator()
    deduplicator.restore(writer.read(_HASHES, np.uint64).reshape(-1, 2))
    try:
        with (
            FileHashes(reader.paths, state.sha256) as hashes,
            Progress("tokenizing", reader.total_bytes) as progress,
            closing(_encoded_batches(raw_batches, encoder, options.workers)) as batches,
        ):
            for batch, end in batches:
                if batch.hashes_N2 is not None:
                    batch = batch.only(deduplicator.filter_hashes(batch.hashes_N2))
                    writer.append(_HASHES, deduplicator.new_hashes())
                writer.add_documents(batch.tokens_T, batch.lengths_N, batch.word_starts_T)
                state.add(batch, end)
                state.sha256 = hashes.computed(state.position.file)
                progress.show(reader.bytes_read, f"{rounded(state.counts.tokens)} tokens")
                if writer.is_commit_due:
                    writer.commit(state.note(inputs))
            if not state.counts.tokens and options.shard is None:
                raise _no_token(state.counts)
            state.sha256 = hashes.all()
        inputs.check_unchanged()
    except DataError as error:
        if not state.counts.tokens:
            raise
        # Whatever cannot be used, the writer holds the batches that came before it, whole.
        writer.commit(state.note(inputs))
        raise DataError(
            f"{error}; what was done until then is kept in {writer.partial}: mend that "
            f"and give the same command to go on (with --restart, to begin anew, if an input was "
            f"changed after the first of its documents)"
        ) from error


def _identity(
    options: PreprocessOptions, inputs: InputDocuments, encoder: Encoder
) -> dict[str, str]:
    """Describe all that the files depend on, but for the inputs' content."""
    unicode = f" of Unicode {unicodedata.unidata_version}" if options.normalize == "nfkc" else ""
    return {
        "the tokenizer's SHA-256": encoder.tokenizer.hash,
        "the tokenizer's library": ", ".join(
            f"{package} {version(package)}" for package in ("sentencepiece", "tokenizers")
        ),
        "--json-key": options.json_key,
        "--field-key": json.dumps(list(options.field_keys), ensure_ascii=False),
        "--normalize": options.normalize + unicode,
        "--deduplicate": str(options.deduplicate),
        "--txt-documents": options.txt_documents,
        "--word-boundaries": str(encoder.words_name),
        "--shard": str(options.shard),
        **inputs.identity(),
    }


def _encoded_batches(
    batches: Iterator[tuple[RawBatch, Position]], encoder: Encoder, num_workers: int
) -> Generator[tuple[EncodedBatch, Position], None, None]:
    """Batches in input order, each with the place after it.

    Reading goes on while workers encode, a few batches ahead.
    """
    pending: deque[tuple[Future[EncodedBatch], Position]] = deque()
    with ThreadPoolExecutor(num_workers, "tokenize") as workers:
        try:
            problem: DataError | None = None
            while True:
                try:
                    batch, end = next(batches)
                except StopIteration:
                    break
                except DataError as error:
                    # Not before what was read ahead is given out.
                    problem = error
                    break
                pending.append((workers.submit(encoder.encode, batch), end))
                if len(pending) >= _BATCHES_PER_WORKER * num_workers:
                    encoded, end = pending.popleft()
                    yield encoded.result(), end
            while pending:
                encoded, end = pending.popleft()
                yield encoded.result(), end
            if problem is not None:
                raise problem
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _no_token(counts: PreprocessCounts) -> DataError:
    return DataError(
        f"the input holds no token ({counts.empty_documents} empty documents, "
        f"{counts.skipped_lines} skipped lines); give files with text"
    )


def _info(state: _State, inputs: InputDocuments, encoder: Encoder) -> DatasetInfo:
    reader, tokenizer = inputs.reader, encoder.tokenizer
    files = zip(reader.paths, reader.sizes, state.sha256, strict=True)
    return DatasetInfo(
        tokenizer_hash=tokenizer.hash,
        tokenizer_name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        **asdict(state.counts),
        normalization=encoder.normalize,
        fields=state.fields.to_json(),
        word_boundaries=encoder.words_name,
        shard_set=inputs.shard_set,
        sources=tuple(
            SourceFile(str(path), size, sha256, inputs.part) for path, size, sha256 in files
        ),
    )
