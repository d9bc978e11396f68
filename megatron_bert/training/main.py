"""The command line of `pretrain_bert.py`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_bert.config.arithmetic import fixed_eval_length, resolve_vocab_size
from megatron_bert.config.checks import check_config
from megatron_bert.config.errors import UserError
from megatron_bert.config.load import dump_config, load_config
from megatron_bert.config.schema import Config
from megatron_bert.data.indexed_dataset import open_dataset
from megatron_bert.data.source import training_source, validation_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.agreement import Ranks
from megatron_bert.distributed.launch import (
    choose_device,
    end_process_group,
    requested_world_size,
    start_process_group,
)
from megatron_bert.training.description import describe_plan, describe_source
from megatron_bert.training.run_directory import RunDirectory, record_failure
from megatron_bert.training.runtime import keep_freed_memory, set_determinism
from megatron_bert.training.stops import StopRequests
from megatron_bert.training.trainer import Trainer

logger = logging.getLogger(__name__)

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or look at what would be trained; returns the exit code.

    Raises:
        UserError: configuration, data or checkpoint cannot be used (exit code 2).
    """
    # Intermixed: overrides may stand on both sides of the options.
    args = _parser().parse_intermixed_args(arguments)
    _set_up_logging()
    config = load_config(args.config, args.overrides)
    if args.print_config:
        sys.stdout.write(dump_config(config))
        return 0
    if args.dry_run:
        check_config(config, world_size=requested_world_size())
        _dry_run(config)
        return 0
    _train(config)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain_bert.py",
        description="Pretrain a BERT-type encoder. Start it with torchrun for several ranks, "
        "or with python for one.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="keys that replace the file's, e.g. optimizer.lr=1e-4 data.train.0.prefix=data/ja",
    )
    look = parser.add_mutually_exclusive_group()
    look.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and leave"
    )
    look.add_argument(
        "--dry-run",
        action="store_true",
        help="check configuration, tokenizer, data and layout, print the plan and leave",
    )
    return parser


def _set_up_logging() -> None:
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO if first else logging.WARNING,
        format="%(message)s" if first else f"[rank {rank}] %(message)s",
    )


def _dry_run(config: Config) -> None:
    """Print the plan, also where data is missing; then say what is missing.

    Raises:
        UserError: tokenizer or data are missing or do not fit; all problems in one message.
    """
    problems: list[str] = []
    tokenizer = _attempt(lambda: Tokenizer.load(Path(config.data.tokenizer)), problems)
    for corpus in (*config.data.train, *config.data.valid):
        _attempt(partial(open_dataset, corpus.prefix), problems)
    vocab_size = config.model.vocab_size
    data_lines: list[str] = []
    if tokenizer is not None:
        resolve = partial(resolve_vocab_size, config.model, tokenizer.vocab_size)
        vocab_size = _attempt(lambda: resolve(config.parallel.tensor), problems)
        if not problems:
            data_lines = _attempt(partial(_describe_data, config, tokenizer), problems) or []
    for line in [*describe_plan(config, vocab_size, requested_world_size()), *data_lines]:
        logger.info("%s", line)
    if problems:
        raise UserError("\n".join(problems))


def _describe_data(config: Config, tokenizer: Tokenizer) -> list[str]:
    """Open and plan all data; return a line a corpus."""
    lines = describe_source("train", training_source(config, tokenizer))
    for corpus in config.data.valid:
        source = validation_source(config, tokenizer, corpus, fixed_eval_length(config))
        lines += describe_source("valid", source)
    return lines


def _attempt(work: Callable[[], T], problems: list[str]) -> T | None:
    """Return what `work` does, or None and its error among the problems."""
    try:
        return work()
    except UserError as error:
        problems.append(str(error))
        return None


def _train(config: Config) -> None:
    stops = StopRequests(config.run.max_minutes)
    device = choose_device(config.run.device)
    set_determinism(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    start_process_group(device, config.distributed.timeout_seconds)
    directory = _open_run_directory(config)
    with _failure_recorded(config):
        # Here, not before: a refusal must replace what an earlier job left in the run directory.
        check_config(config, world_size=requested_world_size())
        trainer = Trainer(config, device, directory)
        end = trainer.run(stops)
    if directory is not None:
        outcome: dict[str, object] = {"step": end.step}
        if end.stop_reason is None:
            directory.finish(outcome)
            logger.info("finished after step %s", f"{end.step:,}")
        else:
            directory.stop({**outcome, "reason": end.stop_reason})
            logger.info("stopped after step %s: %s", f"{end.step:,}", end.stop_reason)
    end_process_group()


def _open_run_directory(config: Config) -> RunDirectory | None:
    """Lock the run directory on the first rank; all ranks fail if it is taken."""
    opened: list[RunDirectory] = []

    def open_it() -> None:
        directory = RunDirectory(config.run.directory)
        directory.start()
        opened.append(directory)

    Ranks().on_first(open_it)
    return opened[0] if opened else None


@contextmanager
def _failure_recorded(config: Config) -> Iterator[None]:
    """Leave FAILED in the run directory whichever rank fails: torchrun may end the first one."""
    try:
        yield
    except BaseException as error:
        record_failure(config.run.directory, dist.get_rank(), error)
        raise
