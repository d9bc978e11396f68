"""What kinds of kernels a GPU spends a step's time in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# The first pattern that a kernel's name matches says what it is.
_KINDS = (
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|attention"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|cublas|splitK"),
    ("optimizer", r"adam|multi_tensor|lpnorm"),
    ("data", r"Memcpy HtoD"),
    (
        "norm and elementwise",
        r"triton_|fused_|elementwise|layer_norm|reduce|softmax|vectorized|cat|copy",
    ),
)
# Enough to see where what is neither product nor attention goes.
_LONGEST = 40


def kernel_shares(step: Callable[[], object]) -> tuple[dict[str, float], dict[str, float]]:
    """Take a step and sum the device's time in it.

    Returns:
        Shares by kind, "idle" among them, and those of the kernels that take longest, by name; of
        the time from the first kernel's begin to the last one's end.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spans = [
        (event.name(), event.start_ns(), event.end_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type().name == "CUDA"
    ]
    if not spans:
        return {}, {}
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    total = max(end for _, _, end in spans) - min(begin for _, begin, _ in spans)
    for name, begin, end in spans:
        kinds[kind_of(name)] += (end - begin) / total
        kernels[name[:90]] += (end - begin) / total
    kinds["idle"] = 1.0 - _busy(spans) / total
    return _sorted(kinds), dict(list(_sorted(kernels).items())[:_LONGEST])


def _busy(spans: list[tuple[str, int, int]]) -> int:
    """Nanoseconds in which at least one kernel ran: those of several streams overlap."""
    busy = until = 0
    for _, begin, end in sorted(spans, key=lambda span: span[1]):
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.I)), "other")


def _sorted(shares: dict[str, float]) -> dict[str, float]:
    return {
        name: round(share, 4) for name, share in sorted(shares.items(), key=lambda item: -item[1])
    }
