"""What a dataset holds, and which rows a run's steps read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from _megatron_bert_core import IndexedDataset

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.errors import DataError
from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch
from megatron_bert.data.indexed_dataset import open_dataset, read_dataset_info
from megatron_bert.data.source import training_source
from megatron_bert.data.tokenizer import Tokenizer

_BAR_WIDTH = 50
_SAMPLE_TOKENS = 60
# Bounds time and memory, whatever the corpus.
_ENTROPY_TOKENS = 1 << 24

# Bounds the memory of a step's inspection, whatever its global batch.
_SLOTS_AT_A_TIME = 1 << 20


def describe_dataset(prefix: str) -> Iterator[str]:
    """Yield lines on a dataset: counts, provenance, distribution of document lengths.

    Raises:
        DataError: the dataset is missing or damaged.
    """
    dataset = open_dataset(prefix)
    lengths = dataset.document_lengths()
    yield f"dataset       {prefix}"
    yield f"documents     {dataset.num_documents:,}"
    yield f"sequences     {dataset.num_sequences:,}"
    yield f"tokens        {dataset.num_tokens:,} of {dataset.token_bytes} bytes"
    info = read_dataset_info(prefix)
    if info is None:
        yield f"no {prefix}.json: tokenizer and sources are not known"
    else:
        yield f"tokenizer     {info.tokenizer_name}, {info.vocab_size:,} pieces"
        yield f"its SHA-256   {info.tokenizer_hash}"
        for source in info.sources:
            yield f"source        {source.path}, {source.bytes:,} bytes"
    if len(lengths):
        quartiles = np.percentile(lengths, [0, 25, 50, 75, 100]).astype(np.int64)
        yield (
            "tokens per document: "
            + ", ".join(
                f"{name} {value:,}"
                for name, value in zip(
                    ("least", "quarter", "median", "three quarters", "most"), quartiles, strict=True
                )
            )
            + f", mean {lengths.mean():,.1f}"
        )
        yield from _histogram(lengths)
    if dataset.num_tokens:
        entropy, counted = _unigram_entropy(dataset)
        yield (
            f"unigram entropy {entropy:.3f} nats over {counted:,} tokens: the loss of a model that "
            "looks at no context"
        )


def samples(prefix: str, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """Yield the beginnings of `count` documents, evenly spread over the dataset, as text.

    Raises:
        DataError: the dataset is missing or damaged, or another tokenizer made it.
    """
    dataset = open_dataset(prefix)
    info = read_dataset_info(prefix)
    if info is not None and info.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"dataset {prefix} was made with tokenizer {info.tokenizer_name} of SHA-256 "
            f"{info.tokenizer_hash}, but {tokenizer.name} has {tokenizer.hash}; give the former"
        )
    for number in np.linspace(0, dataset.num_documents - 1, min(count, dataset.num_documents)):
        tokens = dataset.document(int(number))
        # As unsigned numbers, so that a negative id is too large as well.
        largest = int(tokens.view(np.uint32).max(initial=0))
        if largest >= tokenizer.vocab_size:
            raise DataError(
                f"document {int(number)} of {prefix} holds id {largest}, but tokenizer "
                f"{tokenizer.name} has {tokenizer.vocab_size} pieces; give the one that made the "
                f"dataset"
            )
        more = "..." if len(tokens) > _SAMPLE_TOKENS else ""
        text = tokenizer.decode(tokens[:_SAMPLE_TOKENS].tolist())
        yield f"document {int(number):,} ({len(tokens):,} tokens): {text!r}{more}"


def describe_steps(
    config: Config, first_step: int, last_step: int, *, with_text: bool = False
) -> Iterator[str]:
    """Yield for each step, both ends included, the line `step K stage I batch_hash H`.

    Steps count from 1, stages from 0, the hash has 16 hex digits: the values that training writes
    into `metrics.jsonl`. With text, a line for each of the step's rows comes before.

    Raises:
        DataError: the steps do not lie in the run, or its data cannot be read.
    """
    curriculum = Curriculum(config)
    if not 1 <= first_step <= last_step <= curriculum.total_steps:
        raise DataError(
            f"steps {first_step}:{last_step} do not lie in the run, whose steps are "
            f"1:{curriculum.total_steps}; see --steps"
        )
    tokenizer = Tokenizer.load(config.data.tokenizer)
    source = training_source(config, tokenizer)
    source.check_unchanged()  # planning a large corpus takes a while
    for step in range(first_step, last_step + 1):
        span = curriculum.at(step)
        rows = span.rows_of(step)
        rows_at_a_time = max(1, _SLOTS_AT_A_TIME // span.seq_length)
        batch_hash = 0
        for first in rows[::rows_at_a_time]:
            rows_B = np.arange(first, min(rows.stop, first + rows_at_a_time), dtype=np.int64)
            batch = source.batch(rows_B, span.index)
            batch_hash = (batch_hash + batch.batch_hash) % 2**64
            if with_text:
                yield from _row_texts(batch, tokenizer)
        yield f"step {step} stage {span.index} batch_hash {batch_hash:016x}"


def _row_texts(batch: Batch, tokenizer: Tokenizer) -> Iterator[str]:
    """A line a row: its number, how many tokens are masked, and its segments before masking."""
    for row, positions_S, masked_M, labels_M, weights_M, tokens_S in zip(
        batch.rows_B.tolist(),
        batch.positions_BS.numpy(),
        batch.masked_BM.numpy(),
        batch.labels_BM.numpy(),
        batch.weights_BM.numpy() > 0.0,
        batch.tokens_BS.numpy().copy(),
        strict=True,
    ):
        tokens_S[masked_M[weights_M]] = labels_M[weights_M]
        segments = np.split(tokens_S, np.flatnonzero(positions_S == 0)[1:])
        # Padding, a segment of its own, has no text.
        texts = [repr(text) for ids in segments if (text := tokenizer.decode(ids.tolist()))]
        yield f"row {row} ({int(weights_M.sum())} masked): {' | '.join(texts)}"


def _unigram_entropy(dataset: IndexedDataset) -> tuple[float, int]:
    """Entropy of the tokens' frequencies, and over how many tokens of evenly spaced documents."""
    stride = -(-dataset.num_tokens // _ENTROPY_TOKENS)
    numbers = range(0, dataset.num_documents, stride)
    tokens = np.concatenate([dataset.document(number) for number in numbers])
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / max(1, len(tokens))
    return float(-(shares * np.log(shares)).sum()), len(tokens)


def _histogram(lengths: npt.NDArray[np.int64]) -> Iterator[str]:
    """Bars over lengths 0, 1, 2-3, 4-7, ...: text lengths spread over orders of magnitude."""
    buckets = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(buckets)
    for bucket in range(int(buckets.min()), len(counts)):
        low = 1 << bucket >> 1
        high = max(low, (1 << bucket) - 1)
        bar = "#" * int(np.ceil(_BAR_WIDTH * counts[bucket] / counts.max()))
        yield f"{low:>12,} - {high:<12,} {counts[bucket]:>12,} {bar}"
