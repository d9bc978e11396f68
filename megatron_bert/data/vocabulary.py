"""The number of rows of the embedding table, from a configuration and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.config.arithmetic import resolve_vocab_size
from megatron_bert.config.schema import Config
from megatron_bert.data.tokenizer import Tokenizer


def padded_vocab_size(config: Config) -> int:
    """`model.vocab_size`; if unset, the padded number of the tokenizer's pieces, which is opened.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    pieces = Tokenizer.load(Path(config.data.tokenizer)).vocab_size
    return resolve_vocab_size(config.model, pieces)
