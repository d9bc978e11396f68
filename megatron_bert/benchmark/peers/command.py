"""From the command line of `tools/benchmark.py peers` to its figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_bert.benchmark.model_command import corpora_of, joined_ranks, subject_of
from megatron_bert.benchmark.peers.measure import PeersFigures, PeersWork, measure_peers
from megatron_bert.benchmark.step.measure import with_dropout
from megatron_bert.distributed.launch import requested_world_size
from megatron_bert.errors import ConfigError


def measure_command(given: argparse.Namespace, say: Callable[[str], None]) -> PeersFigures:
    """Time all trainers in this process.

    Raises:
        UserError: the configuration or the dataset cannot be used, or there are several ranks.
    """
    ranks = requested_world_size()
    if ranks > 1:
        raise ConfigError(
            f"WORLD_SIZE = {ranks}: trainers are compared on one rank; start without torchrun"
        )
    subject = subject_of(given)
    options: dict[str, list[Any]] = {
        "--micro-tokens": subject.micro_tokens,
        "--dropout": subject.dropouts,
    }
    for option, values in options.items():
        if len(values) > 1:
            shown = " ".join(map(str, values))
            raise ConfigError(f"{option} {shown}: trainers are compared at one value; give one")
    with joined_ranks(subject.config) as device, corpora_of(given, subject) as corpora:
        work = PeersWork(
            config=with_dropout(subject.config, subject.dropouts[0]),
            vocab_size=subject.vocab_size,
            corpora=corpora,
            seq_lengths=subject.lengths,
            micro_tokens=subject.micro_tokens[0],
            micro_batches=given.micro_batches,
            steps=1 if given.quick else given.steps,
            warm_up=1 if given.quick else 3,
        )
        return measure_peers(work, device, given.quick, say)
