"""`--dry-run`: everything that can be checked without training, and the plan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from megatron_bert.checkpoint.run_state import RunState
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.arithmetic import resolve_vocab_size
from megatron_bert.config.checks import check_config
from megatron_bert.config.rank_layout import RankLayout
from megatron_bert.config.schema import Config
from megatron_bert.data.indexed_dataset import open_dataset
from megatron_bert.data.source import RowSource, training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.device_facts import facts_at_hand
from megatron_bert.errors import UserError
from megatron_bert.run.directory import check_usable
from megatron_bert.training.auto_layout import with_layout
from megatron_bert.training.description import (
    describe_data,
    describe_plan,
    tell_plan,
    tokenizer_warnings,
)
from megatron_bert.training.held_out import HeldOutRows
from megatron_bert.training.resume import check_continuity, starting_point
from megatron_bert.training.runtime import precision_warnings

T = TypeVar("T")

logger = logging.getLogger(__name__)


def dry_run(config: Config, world_size: int | None) -> None:
    """Print the plan, even if data is missing; then report what is missing.

    Args:
        config: what `load_config` returned.
        world_size: ranks of the job; None plans for the fewest that the layout takes, and says so.

    Raises:
        ConfigError: the configuration cannot be trained on so many ranks.
        UserError: tokenizer or data are missing or do not fit, or `run.dir` cannot be used; all
            problems in one message.
    """
    if world_size is None:
        world_size = _fewest_ranks(config)
    config = with_layout(config, world_size)
    check_config(config, world_size=world_size)
    problems: list[str] = []
    _attempt(partial(check_usable, config.run.directory), problems)
    tokenizer = _attempt(lambda: Tokenizer.load(Path(config.data.tokenizer)), problems)
    for corpus in (*config.data.train, *config.data.valid):
        _attempt(partial(open_dataset, corpus.prefix), problems)
    vocab_size = config.model.vocab_size
    data_lines: list[str] = []
    warnings: list[str] = []
    if tokenizer is not None:
        warnings = list(tokenizer_warnings(Path(config.data.tokenizer), tokenizer))
        vocab_size = _attempt(partial(_resolve_vocab_size, config, world_size, tokenizer), problems)
        if not problems:
            data_lines = _data_lines(config, tokenizer, problems)
    device = facts_at_hand(config.run.device)
    plan = describe_plan(config, vocab_size, world_size, device, whole=True)
    tell_plan([*plan, *data_lines, *warnings, *precision_warnings(config)])
    if problems:
        raise UserError("\n".join(problems))


def _resolve_vocab_size(config: Config, world_size: int, tokenizer: Tokenizer) -> int:
    """Return the number of rows of the embedding table, and check the layout against it."""
    vocab_size = resolve_vocab_size(config.model, tokenizer.vocab_size)
    check_config(config, world_size=world_size, vocab_size=vocab_size)
    return vocab_size


def _fewest_ranks(config: Config) -> int:
    """The smallest job of the configuration's layout; one rank where the job chooses it."""
    if config.parallel.layout == "auto":
        return 1
    fewest = RankLayout.of(config).fewest_ranks
    if fewest > 1:
        logger.info(
            "ranks       %s, the fewest that the layout takes (WORLD_SIZE=N plans for others); "
            "to train, start them: torchrun",
            f"{fewest:,}",
        )
    return fewest


def _data_lines(config: Config, tokenizer: Tokenizer, problems: list[str]) -> list[str]:
    """Open and plan all data; return lines on it and on where the job would start."""
    # Planned once: a long curriculum takes minutes and gigabytes.
    source = _attempt(partial(training_source, config, tokenizer), problems)
    lines: list[str] = []
    if source is not None:
        lines += _attempt(partial(_describe_data, config, tokenizer, source), problems) or []
    lines += _attempt(partial(_describe_start, config, tokenizer, source), problems) or []
    return lines


def _describe_data(config: Config, tokenizer: Tokenizer, source: RowSource) -> list[str]:
    """Open and plan held-out text too; return a line per corpus, and warnings."""
    return list(describe_data(source, HeldOutRows.plan(config, tokenizer), whole=True))


def _describe_start(config: Config, tokenizer: Tokenizer, source: RowSource | None) -> list[str]:
    """Find the checkpoint that the job would resume from; check that it may, if data is there."""
    store = CheckpointStore(config.run.paths.checkpoints, config.checkpoint.keep)
    start = starting_point(config, store)
    if start is None:
        metrics = config.run.paths.metrics
        kept = f"; {metrics}, of an earlier start, is set aside" if _has_content(metrics) else ""
        return [f"begins      afresh{kept}"]
    if source is not None:
        state = RunState(start.path, store.read_state(start.path))
        check_continuity(start, state, config, tokenizer, source)
    return [f"goes on     from {start.path}"]


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _attempt(work: Callable[[], T], problems: list[str]) -> T | None:
    """Return the result of `work`; on a user error, add it to `problems` and return None."""
    try:
        return work()
    except UserError as error:
        problems.append(str(error))
        return None
