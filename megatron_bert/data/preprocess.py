"""Turning text files into an indexed dataset: the work behind tools/preprocess_data.py.

The calling thread reads and writes in file order; worker threads parse and tokenize batches of
documents. Threads suffice: both tokenizer libraries release the GIL.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megatron_bert.command_line.argument_checks import checked
from megatron_bert.command_line.arguments import argument
from megatron_bert.data.dataset_writer import DatasetWriter
from megatron_bert.data.deduplication import Deduplicator
from megatron_bert.data.dictionary_words import WordFinder
from megatron_bert.data.encoding import EncodedBatch, Encoder
from megatron_bert.data.input_documents import FileHashes, InputDocuments, Position
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.preprocess_state import PreprocessCounts, PreprocessState
from megatron_bert.data.raw_documents import RawBatch
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_export import export_obstacle
from megatron_bert.errors import DataError
from megatron_bert.progress_bar import ProgressBar
from megatron_bert.words import rounded

logger = logging.getLogger(__name__)

# Small enough that a few long documents keep every worker busy, large enough (some 60,000 tokens)
# that handing a batch over costs nothing compared with encoding it.
_BATCH_BYTES = 1 << 18
_BATCH_DOCUMENTS = 4096
_BATCHES_PER_WORKER = 4

_HASHES = "hashes"


@checked
def preprocess(options: PreprocessOptions) -> PreprocessCounts:
    """Tokenize text files into `P.bin` and `P.idx`, with `P.json` (and `P.words`) beside them.

    One document of text becomes one document of one sequence, without special tokens. Documents
    keep the order of the input, whatever the number of workers. Memory is bounded by a few
    batches a worker. The work of a job that was killed or failed is kept in `P.partial`; the same
    call continues from there, and the result equals that of an uninterrupted job.

    Raises:
        UserError: an option has an invalid value.
        DataError: an input, the tokenizer or the output cannot be used, a line cannot be used
            (unless `on_error` is `skip`), no input holds a token, or `P.partial` is in use or
            belongs to another call. An existing dataset is unchanged then.
    """
    options.check()
    inputs = InputDocuments(
        options.input_files,
        options.txt_documents,
        options.json_key,
        options.field_keys,
        options.shard,
    )
    tokenizer = Tokenizer.load(options.tokenizer)
    obstacle = export_obstacle(Path(options.tokenizer), tokenizer)
    if obstacle is not None:
        logger.warning(
            "tokenizer %s %s: runs with it cannot be exported to Hugging Face",
            options.tokenizer,
            obstacle,
        )
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
            state = PreprocessState.of_note(writer.note, options.field_keys, inputs)
            if writer.note is not None:
                logger.warning("goes on behind %s documents", f"{state.counts.documents:,}")
            if writer.is_placing:
                writer.place()
            else:
                _write_documents(writer, state, options, inputs, encoder)
                writer.finish(state.note(inputs), state.info(inputs, encoder))
            _warn(state, options, inputs)
            return state.counts
    except OSError as error:
        raise DataError(
            f"cannot make dataset {prefix}: {error}; free space, or mend what else this says of "
            "the host, and give the same command again: it goes on where it ended"
        ) from error


def _warn(state: PreprocessState, options: PreprocessOptions, inputs: InputDocuments) -> None:
    """Warn about results that the user may not have intended."""
    for key in state.fields.keys_without_values():
        logger.warning("no document has the field %r; see %s", key, argument("field_keys"))
    if options.deduplicate and inputs.part is not None:
        logger.warning(
            "shards share files, and a duplicate is found only within a shard; to find them all, "
            "preprocess in one job, or divide the files beforehand"
        )


def _write_documents(
    writer: DatasetWriter,
    state: PreprocessState,
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
            ProgressBar("tokenizing", reader.total_bytes) as progress,
            closing(_encoded_batches(raw_batches, encoder, options.workers)) as batches,
        ):
            for batch, end in batches:
                if batch.hashes_N2 is not None:
                    is_new_N = deduplicator.filter_hashes(batch.hashes_N2)
                    writer.append(_HASHES, batch.hashes_N2[is_new_N])
                    batch = batch.only(is_new_N)
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
        # Whatever cannot be used, the writer holds the complete batches that came before it.
        writer.commit(state.note(inputs))
        begun = inputs.reader.paths[: state.position.num_begun]
        remedy = (
            "documents of this file are among it, so if the file is changed, begin anew with "
            f"{argument('restart', True)}"
            if str(error).startswith(tuple(f"{path}{end}" for path in begun for end in (",", " ")))
            else "mend that and do the same again to go on"
        )
        raise DataError(
            f"{error}; what was done until then is kept in {writer.partial}: {remedy}"
        ) from error


def _identity(
    options: PreprocessOptions, inputs: InputDocuments, encoder: Encoder
) -> dict[str, str]:
    """Describe everything that the files depend on but the inputs' content; arguments by name."""
    unicode = f" of Unicode {unicodedata.unidata_version}" if options.normalize == "nfkc" else ""
    return {
        "the tokenizer's SHA-256": encoder.tokenizer.hash,
        "the tokenizer's library": ", ".join(
            f"{package} {version(package)}" for package in ("sentencepiece", "tokenizers")
        ),
        "json_key": options.json_key,
        "field_keys": json.dumps(list(options.field_keys), ensure_ascii=False),
        "normalize": options.normalize + unicode,
        "deduplicate": str(options.deduplicate),
        "txt_documents": options.txt_documents,
        "word_boundaries": str(encoder.words_name),
        "shard": str(options.shard),
        **inputs.identity(),
    }


def _encoded_batches(
    batches: Iterator[tuple[RawBatch, Position]], encoder: Encoder, num_workers: int
) -> Generator[tuple[EncodedBatch, Position], None, None]:
    """Yield batches in input order, each with the place after it.

    Reading stays a few batches ahead of the workers that encode.
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
                    # Raised only after the batches read before it have been yielded.
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
