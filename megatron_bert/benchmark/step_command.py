"""From the command line of `tools/benchmark.py step` to its figures."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from _megatron_bert_core import IndexedDataset

from megatron_bert.benchmark.step import StepFigures, StepWork, measure_steps
from megatron_bert.benchmark.synthetic import ARTICLES, VOCAB_SIZE, Corpora, write_corpora
from megatron_bert.config.arithmetic import resolve_vocab_size
from megatron_bert.config.checks import check_config
from megatron_bert.config.errors import ConfigError, DataError
from megatron_bert.config.load import load_config
from megatron_bert.config.schema import Config
from megatron_bert.distributed.launch import (
    abandon_process_group,
    choose_device,
    end_process_group,
    requested_world_size,
    start_process_group,
)
from megatron_bert.training.runtime import keep_freed_memory, set_determinism

# Those of RetrievaBERT's curriculum.
_LENGTHS = (128, 256, 512, 2048)

_TOKENS = 4_000_000
_QUICK_TOKENS = 100_000


def measure_command(given: argparse.Namespace, say: Callable[[str], None]) -> StepFigures | None:
    """Join the ranks, measure, and leave them; None on all ranks but the first.

    Raises:
        UserError: the configuration or the dataset cannot be used.
    """
    config = load_config(given.config, given.overrides)
    if config.mlm.unit == "whole_word":
        # Words need a dictionary's table; what is measured does not depend on them.
        mlm = config.mlm.model_copy(update={"unit": "ngram"})
        config = config.model_copy(update={"mlm": mlm})
    vocab_size = resolve_vocab_size(config.model, VOCAB_SIZE, config.parallel.tensor)
    check_config(config, world_size=requested_world_size(), vocab_size=vocab_size)
    lengths = _lengths(given.lengths, config)
    device = choose_device(config.run.device)
    set_determinism(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    start_process_group(device, config.distributed.timeout_seconds)
    is_first = dist.get_rank() == 0
    try:
        with tempfile.TemporaryDirectory(prefix="megatron_bert_benchmark_") as folder:
            work = _work(given, config, lengths, vocab_size, _corpora(given, Path(folder)))
            figures = measure_steps(work, device, given.quick, say if is_first else _hush)
        told = figures if is_first else None
    except BaseException:
        abandon_process_group()
        raise
    end_process_group()
    return told


def _hush(_: str) -> None:
    """Say nothing: the first rank does."""


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


def _corpora(given: argparse.Namespace, folder: Path) -> Corpora:
    if given.data is None:
        return write_corpora(folder, ARTICLES, _QUICK_TOKENS if given.quick else _TOKENS, [1.0])
    for suffix in (".bin", ".idx"):
        if not Path(given.data + suffix).is_file():
            raise DataError(
                f"--data {given.data}: there is no {given.data}{suffix}; give the prefix that "
                "tools/preprocess_data.py wrote, without its endings"
            )
    dataset = IndexedDataset(given.data)
    if dataset.max_token_id() >= VOCAB_SIZE:
        raise DataError(
            f"--data {given.data}: it has token ids of {VOCAB_SIZE} and above; give a dataset that "
            "was made with the LLM-jp tokenizer v3.0"
        )
    return Corpora((given.data,), (1.0,))


def _work(
    given: argparse.Namespace,
    config: Config,
    lengths: list[int],
    vocab_size: int,
    corpora: Corpora,
) -> StepWork:
    return StepWork(
        config=config,
        vocab_size=vocab_size,
        corpora=corpora,
        seq_lengths=lengths,
        micro_tokens=given.micro_tokens or [config.batch.max_micro_rows(1)],
        dropouts=given.dropout or [None],
        micro_batches=1 if given.quick else given.micro_batches,
        steps=1 if given.quick else given.steps,
        warm_up=1 if given.quick else 3,
    )
