"""From the command line of `tools/benchmark.py kernels` to its figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron_bert.benchmark.kernels.measure import KernelFigures, measure_kernels
from megatron_bert.benchmark.kernels.pieces import make_pieces
from megatron_bert.benchmark.kernels.work import KernelWork
from megatron_bert.benchmark.model_command import corpora_of, joined_ranks, subject_of
from megatron_bert.distributed.launch import requested_world_size
from megatron_bert.errors import ConfigError


def measure_command(given: argparse.Namespace, say: Callable[[str], None]) -> KernelFigures:
    """Measure in this process alone.

    Raises:
        UserError: the configuration or the dataset cannot be used.
    """
    ranks = requested_world_size()
    if ranks > 1:
        raise ConfigError(
            f"kernels under torchrun with {ranks} ranks: they are measured on one; start it with "
            "python"
        )
    subject = subject_of(given)
    config, lengths = subject.config, subject.lengths
    with joined_ranks(config) as device, corpora_of(given, subject) as corpora:
        work = KernelWork(
            config,
            subject.vocab_size,
            corpora,
            lengths,
            [max(lengths)] if given.quick else subject.micro_tokens,
            subject.dropouts,
            device,
        )
        compute = config.precision.compute
        return measure_kernels(make_pieces(work), device, compute, given.quick, say)
