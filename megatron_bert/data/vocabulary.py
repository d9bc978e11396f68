"""Rows of the embedding table that a configuration and its tokenizer give."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.config.arithmetic import resolve_vocab_size
from megatron_bert.config.schema import Config
from megatron_bert.data.tokenizer import Tokenizer


def padded_vocab_size(config: Config) -> int:
    """`model.vocab_size`, or else the tokenizer's pieces, padded; the tokenizer is opened then.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    pieces = Tokenizer.load(Path(config.data.tokenizer)).vocab_size
    return resolve_vocab_size(config.model, pieces)
