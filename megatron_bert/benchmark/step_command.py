"""From the command line of `tools/benchmark.py step` to its figures."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_bert.benchmark.step import StepFigures, StepWork, measure_steps
from megatron_bert.benchmark.synthetic import ARTICLES, VOCAB_SIZE, Corpora, write_corpora
from megatron_bert.config.arithmetic import resolve_vocab_size
from megatron_bert.config.checks import check_config
from megatron_bert.config.errors import DataError
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

_TOKENS = 4_000_000
_QUICK_TOKENS = 100_000


def measure_command(given: argparse.Namespace, say: Callable[[str], None]) -> StepFigures:
    """Join the ranks, measure, and leave them.

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
    device = choose_device(config.run.device)
    set_determinism(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    start_process_group(device, config.distributed.timeout_seconds)
    try:
        with tempfile.TemporaryDirectory(prefix="megatron_bert_benchmark_") as folder:
            work = _work(given, config, vocab_size, _corpora(given, Path(folder)))
            figures = measure_steps(work, given.quick, say)
    except BaseException:
        abandon_process_group()
        raise
    end_process_group()
    return figures


def _corpora(given: argparse.Namespace, folder: Path) -> Corpora:
    if given.data is None:
        return write_corpora(folder, ARTICLES, _QUICK_TOKENS if given.quick else _TOKENS, [1.0])
    for suffix in (".bin", ".idx"):
        if not Path(given.data + suffix).is_file():
            raise DataError(
                f"--data {given.data}: there is no {given.data}{suffix}; give the prefix that "
                "tools/preprocess_data.py wrote, without its endings"
            )
    return Corpora((given.data,), (1.0,))


def _work(given: argparse.Namespace, config: Config, vocab_size: int, corpora: Corpora) -> StepWork:
    return StepWork(
        config=config,
        vocab_size=vocab_size,
        corpora=corpora,
        seq_lengths=given.lengths,
        micro_tokens=given.micro_tokens or [config.batch.max_micro_rows(1)],
        dropouts=given.dropout or [None],
        micro_batches=1 if given.quick else given.micro_batches,
        steps=1 if given.quick else given.steps,
        warm_up=1 if given.quick else 3,
        profiles=torch.cuda.is_available(),
    )
