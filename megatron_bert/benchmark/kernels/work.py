"""The settings at which pieces of a step are measured, and what several of them share.

Shape suffixes: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_bert.benchmark.kernels.measure import Outputs
from megatron_bert.benchmark.synthetic import Corpora
from megatron_bert.config.schema import Config
from megatron_bert.model.build import DTYPES
from megatron_bert.parallel.random import dropout_keys, element_draws, vector_draws

Made = TypeVar("Made", bound=Outputs)


@dataclass(frozen=True)
class KernelWork:
    """What is measured.

    Attributes:
        config: model, precision, compilation.
        vocab_size: padded vocabulary.
        corpora: where the rows come from.
        seq_lengths: of the rows.
        micro_tokens: maximum tokens of a micro-batch.
        dropouts: of hidden states and attention weights; None keeps the configuration's.
        device: where to measure.
    """

    config: Config
    vocab_size: int
    corpora: Corpora
    seq_lengths: Sequence[int]
    micro_tokens: Sequence[int]
    dropouts: Sequence[float | None]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return DTYPES[self.config.precision.compute]

    def random(self, *shape: int) -> Tensor:
        """A tensor of random numbers that gets a gradient."""
        return torch.randn(shape, dtype=self.dtype, device=self.device, requires_grad=True)


def with_compiled(
    work: KernelWork,
    function: Callable[..., Made],
    inputs: Sequence[Any],
    plain: Callable[[], Made],
) -> tuple[dict[str, Callable[[], Made]], dict[str, str]]:
    """The function as it is and, if blocks are compiled, also compiled; and what is absent."""
    if not work.config.compile.enabled:
        return {"eager": plain}, {"compiled": "compile.enabled=false"}
    compiled = torch.compile(function, dynamic=False)
    return {"eager": plain, "compiled": partial(compiled, *inputs)}, {}


def add_fused(
    work: KernelWork,
    fused: Callable[[], Made],
    alternatives: dict[str, Callable[[], Made]],
    absent: dict[str, str],
) -> None:
    """Add the implementation of `kernels: fused`, or why it is not available here."""
    if work.device.type == "cuda" and find_spec("triton") is not None:
        alternatives["fused (ours)"] = fused
    else:
        absent["fused (ours)"] = "takes CUDA with Triton"


def hidden_draws(work: KernelWork, tokens: int) -> tuple[Tensor, Tensor]:
    """The draws [T] and [D] from which masks over hidden states are made."""
    rows = torch.zeros(1, dtype=torch.int64, device=work.device)
    key = dropout_keys(rows, 0, "benchmark", range(1))[0]
    return (
        vector_draws(key, torch.arange(tokens, device=work.device)),
        element_draws(work.config.model.hidden_size, work.device),
    )
