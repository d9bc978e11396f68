"""Training a SentencePiece tokenizer that has all special pieces of masked pretraining."""

from __future__ import annotations

import io
import logging
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece
from pydantic import PositiveInt

from megatron_bert.command_line.argument_checks import checked
from megatron_bert.command_line.arguments import argument
from megatron_bert.command_line.places import write_output
from megatron_bert.data.tokenizer import SPECIAL_PIECES
from megatron_bert.errors import DataError
from megatron_bert.files import StrPath
from megatron_bert.words import counted

DEFAULT_MAX_SENTENCES = 10_000_000

logger = logging.getLogger(__name__)

Normalization = Literal["identity", "nfkc", "nmt_nfkc"]

# SentencePiece drops sentences that are longer; a character has at most four bytes of UTF-8.
_SENTENCE_CHARACTERS = 4096
_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS

# Expected counts are summed thread by thread, so the result depends on the number of threads.
# It is fixed, to give the same model on every machine.
_NUM_THREADS = 8
_SAMPLING_SEED = 1

_NUM_BYTES = 256
_MOST_PIECES = 2**31 - 1

_TOO_LARGE = re.compile(r"Vocabulary size too high.*value <= (\d+)", re.DOTALL)
_TOO_SMALL = re.compile(r"smaller than required_chars. \d+ vs (\d+)")


@checked
def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    *,
    normalization: Normalization = "identity",
    max_sentences: PositiveInt = DEFAULT_MAX_SENTENCES,
    allow_fewer: bool = False,
) -> bytes:
    """Train a unigram model with byte fallback; the same documents give the same bytes.

    The algorithm is SentencePiece's unigram language model (Kudo 2018). Sentences are the lines
    of the documents.

    Args:
        documents: texts, read once.
        vocab_size: number of pieces, including the special ones and 256 bytes.
        normalization: SentencePiece's rule; `identity` keeps every character.
        max_sentences: the most lines, evenly sampled, that are held in memory.
        allow_fewer: treat `vocab_size` as an upper limit if the documents yield fewer pieces.

    Returns:
        The serialized `.model`.

    Raises:
        UserError: an argument has an invalid value.
        DataError: the documents hold no text, or too little or too much for `vocab_size`.
    """
    _check_vocab_size(vocab_size)
    sentences = _sample(_sentences(documents), max_sentences)
    if not sentences:
        raise DataError(
            f"{argument('documents')}: 0 lines of text in all of them; give at least one"
        )
    count = counted(len(sentences), "line")
    logger.info(
        "training %s pieces on %s: takes minutes where there are millions", f"{vocab_size:,}", count
    )
    model = io.BytesIO()
    unknown, begin, end, *control = SPECIAL_PIECES
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=not allow_fewer,
            num_threads=_NUM_THREADS,
            max_sentence_length=_SENTENCE_BYTES,
            # Special pieces are control symbols: raw text never becomes one.
            unk_id=0,
            unk_piece=unknown,
            bos_id=1,
            bos_piece=begin,
            eos_id=2,
            eos_piece=end,
            pad_id=-1,
            control_symbols=control,
            # Every text has tokens, and rare kanji cost no vocabulary.
            byte_fallback=True,
            # 2024 and 1868 share their digits rather than each needing a piece.
            split_digits=True,
            # Text is kept as it is, so that decoding restores it and answer spans keep their
            # offsets: no NFKC, spaces are not merged, and runs of them (code) may be pieces.
            normalization_rule_name=normalization,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # With a dummy prefix the first word of a Japanese text would be a different token
            # (▁東京) from the same word elsewhere (東京): Japanese puts no space before words.
            add_dummy_prefix=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _as_data_error(str(error), vocab_size) from error
    return model.getvalue()


@checked
def write_model(model: bytes, path: StrPath) -> None:
    """Write a model atomically: it appears under its name complete or not at all.

    Raises:
        UserError: it cannot be written there.
    """
    write_output(Path(path), model)


def _check_vocab_size(vocab_size: int) -> None:
    reserved = len(SPECIAL_PIECES) + _NUM_BYTES
    if vocab_size <= reserved:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small: special pieces and bytes alone take "
            f"{reserved}; set a larger {argument('vocab_size')}"
        )
    if vocab_size > _MOST_PIECES:
        raise DataError(
            f"a vocabulary of {vocab_size} is too large: a token's id has 32 bits; set "
            f"{argument('vocab_size')} to {_MOST_PIECES} or lower"
        )


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    """Lines of documents, cut to the length that SentencePiece takes."""
    for document in documents:
        for line in document.split("\n"):
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                yield line[start : start + _SENTENCE_CHARACTERS]


def _sample(sentences: Iterable[str], size: int) -> list[str]:
    """All sentences, or a uniform sample of `size` of them (Vitter 1985, algorithm R).

    SentencePiece samples too, but with a generator that only a thread's first training seeds.
    """
    choose = random.Random(_SAMPLING_SEED)
    sample: list[str] = []
    for count, sentence in enumerate(sentences, start=1):
        if count <= size:
            sample.append(sentence)
        elif (slot := choose.randrange(count)) < size:
            sample[slot] = sentence
    return sample


def _as_data_error(message: str, vocab_size: int) -> DataError:
    if too_large := _TOO_LARGE.search(message):
        return DataError(
            f"a vocabulary of {vocab_size} is too large for this input, which yields at most "
            f"{too_large[1]} pieces; set {argument('vocab_size')} to {too_large[1]} or "
            "lower, or give more text"
        )
    if too_small := _TOO_SMALL.search(message):
        return DataError(
            f"a vocabulary of {vocab_size} is too small: special pieces, bytes and the "
            f"characters of this input need {too_small[1]}; set a "
            f"{argument('vocab_size')} above that"
        )
    return DataError(f"SentencePiece cannot train on this input: {message}; give other text")
