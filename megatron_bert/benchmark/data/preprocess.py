"""The speed of preprocessing text into a dataset, compared with SentencePiece alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sentencepiece

from megatron_bert.benchmark.timing import time_in_turns
from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.preprocess_state import PreprocessCounts
from megatron_bert.data.text import DocumentReader, iterate_documents
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_training import train_tokenizer, write_model
from megatron_bert.errors import DataError

WORKERS = 2
_TRAINED_PIECES = 8000
_TRAINING_LINES = 20_000


@dataclass(frozen=True)
class PreprocessFigures:
    """With two threads each; the minimum of several times unless stated otherwise.

    Attributes:
        tokens_per_second: of `preprocess`, from the file to the dataset on disk, including opening
            the tokenizer.
        sentencepiece_tokens_per_second: of SentencePiece's own call for many documents, from text
            in memory to ids in memory.
        median_tokens_per_second: of `preprocess`, by the median time.
        median_sentencepiece_tokens_per_second: of SentencePiece, by the median time.
        start_seconds: the time of `preprocess` for one word, mostly for opening the tokenizer.
        documents: in the file.
        tokens: in the file.
        text_bytes: of UTF-8.
        tokenizer: the file's name.
        pieces: of the tokenizer.
    """

    tokens_per_second: int
    sentencepiece_tokens_per_second: int
    median_tokens_per_second: int
    median_sentencepiece_tokens_per_second: int
    start_seconds: float
    documents: int
    tokens: int
    text_bytes: int
    tokenizer: str
    pieces: int


def read_documents(paths: Sequence[Path], json_key: str, text_bytes: int) -> list[str]:
    """Read the documents to measure on; lines that cannot be used are left out.

    Args:
        paths: text files; only as much as needed is read.
        json_key: key of the text in `.jsonl`, its column in `.parquet`.
        text_bytes: approximate size in UTF-8; a smaller corpus is repeated.

    Raises:
        DataError: a file is missing or damaged, or none holds text.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"--corpus {path}: no such file; name .jsonl, .txt or .parquet files")
    texts: list[str] = []
    total = 0
    for text in iterate_documents(DocumentReader(paths, json_key=json_key), "skip"):
        texts.append(text)
        total += len(text.encode())
        if total >= text_bytes:
            break
    if not total:
        raise DataError(
            f"--corpus {' '.join(map(str, paths))}: no text under the key {json_key!r}; give "
            f"files that hold text, or its key with --json-key"
        )
    return texts * ceil_div(text_bytes, total)


def tokenizer_for(given: Path | None, texts: Sequence[str], folder: Path) -> Path:
    """The given tokenizer, or one trained on the documents and written into the folder.

    Raises:
        DataError: it is missing or damaged, or not a SentencePiece model.
    """
    if given is None:
        path = folder / "trained.model"
        model = train_tokenizer(
            # A repeated corpus has each text many times; copies teach nothing.
            list(dict.fromkeys(texts)),
            _TRAINED_PIECES,
            max_sentences=_TRAINING_LINES,
            allow_fewer=True,
        )
        write_model(model, path)
        return path
    if given.suffix != ".model":
        raise DataError(
            f"--tokenizer {given}: preprocessing is measured against SentencePiece itself; give a "
            f"SentencePiece .model"
        )
    Tokenizer.load(given)
    return given


def measure_preprocessing(
    texts: Sequence[str], tokenizer: Path, folder: Path, repetitions: int
) -> PreprocessFigures:
    """Write the documents as .jsonl into the folder, and time both tools in turns.

    Raises:
        OSError: the folder cannot be written to.
    """
    ours = _preprocessing(texts, tokenizer, folder / "corpus.jsonl")
    start = _preprocessing(["word"], tokenizer, folder / "word.jsonl")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    # The fastest of its ways to return the ids of many documents.
    theirs = partial(processor.encode, list(texts), out_type="numpy", num_threads=WORKERS)
    counts = ours()
    their_tokens = sum(map(len, theirs()))
    our_time, start_time, their_time = time_in_turns([ours, start, theirs], repetitions)
    return PreprocessFigures(
        tokens_per_second=round(counts.tokens / our_time.best),
        sentencepiece_tokens_per_second=round(their_tokens / their_time.best),
        median_tokens_per_second=round(counts.tokens / our_time.median),
        median_sentencepiece_tokens_per_second=round(their_tokens / their_time.median),
        start_seconds=round(start_time.best, 3),
        documents=counts.documents,
        tokens=counts.tokens,
        text_bytes=sum(len(text.encode()) for text in texts),
        tokenizer=tokenizer.name,
        pieces=len(processor),
    )


def _preprocessing(
    texts: Sequence[str], tokenizer: Path, corpus: Path
) -> Callable[[], PreprocessCounts]:
    """Write the documents as .jsonl; return a function that preprocesses them as the tool does."""
    with corpus.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    options = PreprocessOptions(
        [corpus], tokenizer, corpus.with_suffix(""), workers=WORKERS, overwrite=True
    )
    return partial(preprocess, options)
