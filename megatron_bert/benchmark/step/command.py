"""From the command line of `tools/benchmark.py step` to its figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch.distributed as dist

from megatron_bert.benchmark.model_command import Subject, corpora_of, joined_ranks, subject_of
from megatron_bert.benchmark.step.figures import StepFigures, StepWork
from megatron_bert.benchmark.step.measure import measure_steps
from megatron_bert.benchmark.synthetic import Corpora


def measure_command(given: argparse.Namespace, say: Callable[[str], None]) -> StepFigures | None:
    """Join the ranks, measure, and leave the group; None on all ranks but the first.

    Raises:
        UserError: the configuration or the dataset cannot be used.
    """
    subject = subject_of(given)
    with joined_ranks(subject.config) as device, corpora_of(given, subject) as corpora:
        is_first = dist.get_rank() == 0
        work = _work(given, subject, corpora)
        figures = measure_steps(work, device, given.quick, say if is_first else _hush)
    return figures if is_first else None


def _hush(_: str) -> None:
    """Say nothing: only the first rank does."""


def _work(given: argparse.Namespace, subject: Subject, corpora: Corpora) -> StepWork:
    return StepWork(
        config=subject.config,
        vocab_size=subject.vocab_size,
        corpora=corpora,
        seq_lengths=subject.lengths,
        micro_tokens=subject.micro_tokens,
        dropouts=subject.dropouts,
        micro_batches=1 if given.quick else given.micro_batches,
        steps=1 if given.quick else given.steps,
        warm_up=1 if given.quick else 3,
    )
