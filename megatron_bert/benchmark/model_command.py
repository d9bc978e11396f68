"""What the commands of `tools/benchmark.py` that take a configuration have in common."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from _megatron_bert_core import IndexedDataset

from megatron_bert.benchmark.synthetic import (
    ARTICLES,
    NUM_SPECIAL,
    VOCAB_SIZE,
    Corpora,
    write_corpora,
)
from megatron_bert.config.arithmetic import resolve_vocab_size
from megatron_bert.config.checks import check_config
from megatron_bert.config.load import load_config
from megatron_bert.config.schema import Config
from megatron_bert.distributed.launch import (
    choose_device,
    process_group,
    requested_world_size,
)
from megatron_bert.errors import ConfigError, DataError
from megatron_bert.training.runtime import keep_freed_memory, set_determinism

# The row lengths of RetrievaBERT's curriculum.
_LENGTHS = (128, 256, 512, 2048)

_TOKENS = 4_000_000
_QUICK_TOKENS = 100_000


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        config: the checked configuration.
        vocab_size: padded vocabulary.
        num_ids: all token ids of the rows are below it.
        lengths: of rows.
        micro_tokens: maximum slots of a micro-batch.
        dropouts: None keeps the configuration's.
    """

    config: Config
    vocab_size: int
    num_ids: int
    lengths: list[int]
    micro_tokens: list[int]
    dropouts: list[float | None]


def subject_of(given: argparse.Namespace) -> Subject:
    """Read the configuration and the other options.

    Args:
        given: the command line.

    Raises:
        ConfigError: they cannot be used.
    """
    config = load_config(given.config, given.overrides)
    if config.mlm.unit == "whole_word":
        # Words would need a word table, and the measurements do not depend on them.
        config = config.with_keys({"mlm.unit": "ngram"})
    num_ids = min(VOCAB_SIZE, config.model.vocab_size or VOCAB_SIZE)
    if num_ids < 2 * NUM_SPECIAL:
        raise ConfigError(
            f"model.vocab_size = {num_ids}: made-up rows need {2 * NUM_SPECIAL} ids or more; "
            "give a larger one, or null for the LLM-jp tokenizer's"
        )
    vocab_size = resolve_vocab_size(config.model, num_ids)
    check_config(config, world_size=requested_world_size(), vocab_size=vocab_size)
    return Subject(
        config,
        vocab_size,
        num_ids,
        _lengths(given.lengths, config),
        given.micro_tokens or [config.batch.max_micro_rows(1)],
        given.dropout or [None],
    )


@contextmanager
def joined_ranks(config: Config) -> Iterator[torch.device]:
    """Prepare the process as training does and join the other ranks; yields this rank's device."""
    device = choose_device(config.run.device)
    set_determinism(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    with process_group(device, config.distributed.timeout_seconds):
        yield device


@contextmanager
def corpora_of(given: argparse.Namespace, subject: Subject) -> Iterator[Corpora]:
    """The named dataset, or one of made-up articles, which is removed when the block ends.

    Raises:
        DataError: the dataset cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_bert_benchmark_") as folder:
        yield _corpora(given, subject.num_ids, Path(folder))


def _lengths(given: list[int] | None, config: Config) -> list[int]:
    longest = config.model.max_position_embeddings
    if given is None:
        return [length for length in _LENGTHS if length <= longest] or [longest]
    if max(given) > longest:
        raise ConfigError(
            f"--lengths {max(given)}: longer than model.max_position_embeddings={longest}; "
            f"use at most {longest}, or override that key"
        )
    return given


def _corpora(given: argparse.Namespace, num_ids: int, folder: Path) -> Corpora:
    if given.data is None:
        tokens = _QUICK_TOKENS if given.quick else _TOKENS
        return write_corpora(folder, ARTICLES, tokens, [1.0], num_ids)
    for suffix in (".bin", ".idx"):
        if not Path(given.data + suffix).is_file():
            raise DataError(
                f"--data {given.data}: there is no {given.data}{suffix}; give the prefix that "
                "tools/preprocess_data.py wrote, without its endings"
            )
    dataset = IndexedDataset(given.data)
    if dataset.max_token_id() >= num_ids:
        raise DataError(
            f"--data {given.data}: it has token ids of {num_ids} and above; give a dataset that "
            "was made with the LLM-jp tokenizer v3.0, and leave model.vocab_size out"
        )
    return Corpora((given.data,), (1.0,), num_ids)
