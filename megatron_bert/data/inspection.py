"""What a dataset holds: counts, provenance, lengths, and the beginnings of its documents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from _megatron_bert_core import IndexedDataset

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.data.indexed_dataset import check_tokenizer, open_dataset, read_dataset_info
from megatron_bert.data.length_histogram import count_lengths, histogram
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError
from megatron_bert.words import share

_SAMPLE_TOKENS = 60
# Bounds time and memory, whatever the corpus.
_COUNTED_TOKENS = 1 << 24


def describe_dataset(prefix: str, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """Yield lines on a dataset: counts, provenance, distribution of document lengths.

    With the tokenizer that made it, also the shares of unknown tokens and of byte pieces.

    Raises:
        DataError: the dataset is missing or damaged, or another tokenizer made it.
    """
    dataset = open_dataset(prefix)
    if tokenizer is not None:
        _check_made_by(tokenizer, prefix)
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
        yield from histogram(count_lengths(lengths))
    if dataset.num_tokens:
        ids, counts = _token_counts(dataset)
        shares = counts / counts.sum()
        yield (
            f"unigram entropy {-(shares * np.log(shares)).sum():.3f} nats over {counts.sum():,} "
            "tokens: the loss of a model that looks at no context"
        )
        if tokenizer is not None:
            yield f"unknown       {_share_of_tokens(tokenizer.unknown_ids, ids, counts)}"
            yield f"byte pieces   {_share_of_tokens(tokenizer.byte_ids, ids, counts)}"


def samples(prefix: str, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """Yield the beginnings of `count` documents, evenly spread over the dataset, as text.

    Raises:
        DataError: the dataset is missing or damaged, or another tokenizer made it.
    """
    dataset = open_dataset(prefix)
    _check_made_by(tokenizer, prefix)
    for number in np.linspace(0, dataset.num_documents - 1, min(count, dataset.num_documents)):
        tokens = dataset.document(int(number))
        # Viewed as unsigned, so that a negative id is too large as well.
        largest = int(tokens.view(np.uint32).max(initial=0))
        if largest >= tokenizer.vocab_size:
            raise DataError(
                f"document {int(number)} of {prefix} holds id {largest}, but tokenizer "
                f"{tokenizer.name} has {tokenizer.vocab_size} pieces; give the one that made the "
                f"dataset"
            )
        yield f"document {int(number):,} ({len(tokens):,} tokens): {beginning(tokens, tokenizer)}"


def beginning(tokens_T: npt.NDArray[np.int32], tokenizer: Tokenizer) -> str:
    """The beginning of a document as quoted text, followed by `...` if there is more."""
    more = "..." if len(tokens_T) > _SAMPLE_TOKENS else ""
    return f"{tokenizer.decode(tokens_T[:_SAMPLE_TOKENS].tolist())!r}{more}"


def _check_made_by(tokenizer: Tokenizer, prefix: str) -> None:
    info = read_dataset_info(prefix)
    if info is not None:
        check_tokenizer(prefix, info, tokenizer.name, tokenizer.hash, remedy="give the former")


def _token_counts(
    dataset: IndexedDataset,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The distinct ids in evenly spaced documents, and how often each occurs there."""
    stride = ceil_div(dataset.num_tokens, _COUNTED_TOKENS)
    numbers = range(0, dataset.num_documents, stride)
    tokens = np.concatenate([dataset.document(number) for number in numbers])
    return np.unique(tokens, return_counts=True)


def _share_of_tokens(
    wanted: list[int], ids: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]
) -> str:
    return share(int(counts[np.isin(ids, wanted)].sum()), int(counts.sum()), "tokens")
