"""Moments of a run, counted by what it does and not by the clock, at which a rank can be killed.

A rank goes through two rows of moments, those of the training loop and those of saves (each call
to the host that a checkpoint makes), and either is the same in every run of one configuration.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from megatron_bert.model.build import RankModel
from megatron_bert.optim.sharded import ShardedOptimizer
from megatron_bert.run.metrics import MetricsFile
from megatron_bert.training import trainer
from megatron_bert.training.batches import ReadAhead
from megatron_bert.training.evaluation import Evaluator
from megatron_bert.training.recorder import StepRecorder
from tests.checkpoint.host_calls import HostCall, before_host_calls

Row = Literal["training", "saving"]

# Before and after each call of these; rank 0 alone has a file of metrics.
_OF_TRAINING: Sequence[tuple[object, str]] = (
    (ReadAhead, "__next__"),
    (trainer, "agree"),
    (trainer, "take_step"),
    (RankModel, "sum_shared_gradients"),
    (ShardedOptimizer, "step"),
    (StepRecorder, "add"),
    (MetricsFile, "write"),
    (Evaluator, "evaluate"),
    (trainer, "save_state"),
)


@dataclass(frozen=True)
class Moment:
    """The place of a kill: a rank, and the number of a moment in one of its rows."""

    rank: int
    row: Row
    number: int


def drawn(seed: int, counts: Sequence[Counter[Row]]) -> Moment:
    """A moment drawn from all those of an uninterrupted run, each rank and row as likely."""
    choose = random.Random(seed)
    rank = choose.randrange(len(counts))
    row: Row = choose.choice(("training", "saving"))
    return Moment(rank, row, choose.randrange(counts[rank][row]))


@contextmanager
def counted(own: Moment | None = None) -> Iterator[Counter[Row]]:
    """Count this rank's moments inside the block; at `own` the process gets a kill -9."""
    counts: Counter[Row] = Counter()

    def pass_by(row: Row) -> None:
        if own is not None and (row, counts[row]) == (own.row, own.number):
            os.kill(os.getpid(), signal.SIGKILL)
        counts[row] += 1

    def pass_by_host_call(call: HostCall) -> None:
        if "checkpoints" in call.path.parts:
            pass_by("saving")

    with before_host_calls(pass_by_host_call), pytest.MonkeyPatch.context() as patch:
        for owner, name in _OF_TRAINING:
            patch.setattr(owner, name, _between(pass_by, getattr(owner, name)))
        yield counts


def _between(pass_by: Callable[[Row], None], work: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        pass_by("training")
        result = work(*args, **options)
        pass_by("training")
        return result

    return call
