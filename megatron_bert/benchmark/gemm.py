"""Matrix products timed by themselves: a lower bound for the time of a step."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from megatron_bert.config.block_matrices import block_matrices
from megatron_bert.config.schema import ModelConfig

_CUDA_SIDE, _CPU_SIDE = 8192, 1024
# On CUDA.
_REPETITIONS, _SECONDS_A_REPETITION, _MOST_CALLS = 10, 5e-3, 200


@dataclass(frozen=True)
class Gemm:
    """A linear layer's products on a micro-batch: one forward and two backward.

    Attributes:
        tokens: rows of the input.
        inputs: features in.
        outputs: features out.
        count: how often it occurs in a micro-batch.
    """

    tokens: int
    inputs: int
    outputs: int
    count: int


def model_gemms(model: ModelConfig, vocab_size: int, tokens: int, masked: int) -> list[Gemm]:
    """The products of a micro-batch, without attention's.

    Args:
        model: the model's sizes.
        vocab_size: padded vocabulary.
        tokens: slots of the micro-batch.
        masked: slots that reach the head.
    """
    hidden = model.hidden_size
    shapes = Counter((matrix.inputs, matrix.outputs) for matrix in block_matrices(model))
    return [
        *(Gemm(tokens, *shape, count * model.num_layers) for shape, count in shapes.items()),
        Gemm(masked, hidden, hidden, 1),
        Gemm(masked, hidden, vocab_size, 1),
    ]


def time_gemms(gemms: Sequence[Gemm], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of all of them, one after another."""
    return sum(gemm.count * _gemm_seconds(gemm, dtype, device) for gemm in gemms)


def square_matmul_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s (10^12 operations a second) of one product of square matrices of random numbers."""
    side = _CUDA_SIDE if device.type == "cuda" else _CPU_SIDE
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds = seconds_of(lambda: left @ right, device)
    return 2 * side**3 / seconds / 1e12


def _gemm_seconds(gemm: Gemm, dtype: torch.dtype, device: torch.device) -> float:
    x = torch.randn(gemm.tokens, gemm.inputs, dtype=dtype, device=device)
    y = torch.randn(gemm.tokens, gemm.outputs, dtype=dtype, device=device)
    weight = torch.randn(gemm.outputs, gemm.inputs, dtype=dtype, device=device)
    products: list[Callable[[], object]] = [
        lambda: x @ weight.T,
        lambda: y @ weight,
        lambda: y.T @ x,
    ]
    return sum(seconds_of(product, device) for product in products)


def seconds_of(
    work: Callable[[], object],
    device: torch.device,
    agree: Callable[[int], int] = lambda calls: calls,
) -> float:
    """Seconds of a piece of work: on CUDA the median of repetitions, on a CPU the minimum of three.

    On CUDA a repetition consists of enough successive calls to take some milliseconds, so that the
    events between repetitions do not matter. Work that the device does faster than the host
    launches it still shows the host's time, and small inputs come from the device's cache.

    Args:
        work: what is called.
        device: where it computes.
        agree: for work in which several ranks take part: turns the number of calls that this
            rank's clock suggests into one that is the same on all of them. Collective.
    """
    if device.type != "cuda":
        work()
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
        return min(taken)
    _event_seconds(work, device, calls=1, repetitions=3)
    once = min(_event_seconds(work, device, calls=1, repetitions=3))
    calls = agree(min(_MOST_CALLS, math.ceil(_SECONDS_A_REPETITION / max(once, 1e-6))))
    return statistics.median(_event_seconds(work, device, calls, _REPETITIONS)) / calls


def _event_seconds(
    work: Callable[[], object], device: torch.device, calls: int, repetitions: int
) -> list[float]:
    """Seconds of each repetition of `calls` calls, on CUDA."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        for _ in range(calls):
            work()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
