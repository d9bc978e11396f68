"""Which kinds of kernels a GPU spends a step's time in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, schedule

from megatron_bert.training.profile import OneCycleProfile

# The first pattern that a kernel's name matches determines its kind.
_KINDS = (
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|attention"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|cublas|splitK"),
    ("optimizer", r"adam|multi_tensor|lpnorm"),
    ("data", r"Memcpy HtoD"),
    (
        "norm and elementwise",
        r"triton_|fused_|fp8_|elementwise|layer_norm|reduce|softmax|column_sums|vectorized|cat|copy",
    ),
)
# Enough to see where the time other than products and attention goes.
_LONGEST = 40

# An event that the profiler itself records for a step with a schedule.
_OWN_EVENT = "ProfilerStep"


class Span(NamedTuple):
    """A kernel's run on the device: its name, and its beginning and end in nanoseconds."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class DeviceTime:
    """How a device spent its time in a step.

    Attributes:
        seconds: from the beginning of the first kernel to the end of the last one.
        kinds: shares of this time by kind of kernel, including "idle".
        kernels: shares of the kernels that take longest, by name.
    """

    seconds: float
    kinds: dict[str, float]
    kernels: dict[str, float]


def time_kernels(step: Callable[[], object]) -> DeviceTime | None:
    """Take two steps and sum the device's time in the second; None if no kernel is recorded."""
    return sum_spans(profiled_spans(step, ProfilerActivity.CUDA, torch.cuda.synchronize))


def profiled_spans(
    step: Callable[[], object], activity: ProfilerActivity, wait: Callable[[], object]
) -> list[Span]:
    """Profile a step, after one in which the profiler starts, because starting delays the device.

    Args:
        step: is called twice.
        activity: the device whose kernels are recorded.
        wait: waits until the device has finished its work.

    Returns:
        The kernels that the second step ran there.
    """
    wait()
    once = schedule(wait=0, warmup=1, active=1, repeat=1)
    with OneCycleProfile(activities=[activity], schedule=once) as profiler:
        step()
        wait()
        profiler.step()
        step()
        wait()
    # Events are kept until the next cycle begins, and there is none.
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    return [
        Span(event.name(), event.start_ns(), event.end_ns())
        for event in (results.events() if results else ())
        if event.device_type().name == activity.name and not event.name().startswith(_OWN_EVENT)
    ]


def sum_spans(spans: Sequence[Span]) -> DeviceTime | None:
    """Shares of the time that these kernels span; None if there are no kernels."""
    if not spans:
        return None
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    total = max(span.end for span in spans) - min(span.begin for span in spans)
    for name, begin, end in spans:
        kinds[kind_of(name)] += (end - begin) / total
        kernels[name[:90]] += (end - begin) / total
    kinds["idle"] = 1.0 - _busy(spans) / total
    longest = dict(list(_sorted(kernels).items())[:_LONGEST])
    return DeviceTime(total / 1e9, _sorted(kinds), longest)


def _busy(spans: Sequence[Span]) -> int:
    """Nanoseconds in which at least one kernel ran: kernels of several streams overlap."""
    busy = until = 0
    for _, begin, end in sorted(spans, key=lambda span: span.begin):
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy


def kind_of(name: str) -> str:
    """A kernel's kind, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.I)), "other")


def _sorted(shares: dict[str, float]) -> dict[str, float]:
    return {
        name: round(share, 4) for name, share in sorted(shares.items(), key=lambda item: -item[1])
    }
