"""Measures for the planner what a machine reaches: products, attention, norms, memory, all-reduces.

Under torchrun it also times an all-reduce over all ranks, which measures the links of a single node
or the network of several.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_bert.benchmark.gemm import seconds_of
from megatron_bert.benchmark.machine import describe_hardware
from megatron_bert.distributed.agreement import Ranks
from megatron_bert.distributed.device_facts import device_name
from megatron_bert.host import usable_memory
from megatron_bert.model.attention import PackedLayout, attend, has_kernel
from megatron_bert.planner.calibrated import Calibration
from megatron_bert.planner.compute import ATTENTION_BACKWARD_MOVES
from megatron_bert.planner.machines import GIB, GPUS, Gpu, Rates, find_machine, gpu_of_device

Curve = list[list[float]]

_KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
_HEADS, _HEAD_SIZE, _DROPOUT = 24, 64, 0.1


@dataclass(frozen=True)
class Sizes:
    """The sizes at which a machine is measured.

    Attributes:
        sides: of the matrices in square products.
        tokens: of a norm, at width 1,536.
        rows: of attention.
        length: slots of a row.
        message_bytes: of all-reduces.
    """

    sides: Sequence[int]
    tokens: Sequence[int]
    rows: int
    length: int
    message_bytes: Sequence[int]


_CUDA = Sizes(
    sides=(512, 1024, 2048, 4096, 8192),
    tokens=(1024, 4096, 16384, 65536),
    rows=64,
    length=512,
    message_bytes=[2**power for power in range(14, 29, 2)],
)
_CPU = Sizes(
    sides=(64, 128, 256, 512),
    tokens=(256, 1024, 4096),
    rows=1,
    length=512,
    message_bytes=[2**power for power in range(12, 23, 2)],
)
QUICK = Sizes(sides=(16, 32), tokens=(64,), rows=1, length=32, message_bytes=(256, 4096))


def calibrate(
    name: str,
    device: torch.device,
    say: Callable[[str], None],
    network: str | None = None,
    sizes: Sizes | None = None,
) -> Calibration:
    """Measure this machine. Collective if there is a process group.

    Args:
        name: the machine's name from then on.
        device: this rank's.
        say: called with what is being measured.
        network: between nodes, as `--network` takes it; used if ranks are on several nodes.
        sizes: the sizes to measure. Default: sizes that fill the device.
    """
    is_cuda = device.type == "cuda"
    sizes = sizes or (_CUDA if is_cuda else _CPU)
    curves: dict[str, Curve] = {}
    say("products")
    for kind, dtype in _KINDS.items():
        curves[f"gemm_{kind}"] = [[side, _product(side, dtype, device)] for side in sizes.sides]
    say("norms")
    compute = torch.bfloat16 if is_cuda else torch.float32
    curves["norm"] = [[count, _norm(count, compute, device)] for count in sizes.tokens]
    say("attention")
    curves["attention"] = [
        [dropout, *_attention(sizes, dropout, compute, device)] for dropout in (_DROPOUT, 0.0)
    ]
    if dist.is_initialized() and dist.get_world_size() > 1:
        say(f"all-reduce over {dist.get_world_size()} ranks")
        curves["all_reduce"] = [[size, _all_reduce(size, device)] for size in sizes.message_bytes]
    facts, is_measured = _facts(name, device, curves)
    return Calibration(
        device=device_name(device) if device.type == "cuda" else describe_hardware().processor,
        gpu=facts,
        rates=_rates(facts, is_measured, sizes, curves, compute, network),
        curves=curves,
    )


def _product(side: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return seconds_of(lambda: left @ right, device)


def _norm(tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of forward and backward, which read or write the tokens' values five times."""
    width = _HEADS * _HEAD_SIZE
    norm = torch.nn.LayerNorm(width, dtype=dtype, device=device)
    x = torch.randn(tokens, width, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn_like(x)
    return seconds_of(lambda: torch.autograd.grad(norm(x), x, gradient), device)


def _attention(
    sizes: Sizes, dropout: float, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Seconds of forward, and of forward with backward."""
    rows, length = sizes.rows, sizes.length
    shape = (rows, _HEADS, length, _HEAD_SIZE)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    positions = torch.arange(length, device=device).expand(rows, length)
    layout = PackedLayout.from_positions(positions)
    if not has_kernel(device, dtype, _HEAD_SIZE):
        layout = layout.with_bias(dtype)
    keys = torch.arange(rows, device=device)
    gradient = torch.randn(shape, dtype=dtype, device=device)

    def forward() -> torch.Tensor:
        return attend(q, k, v, layout, dropout, keys)

    both = seconds_of(lambda: torch.autograd.grad(forward(), (q, k, v), gradient), device)
    with torch.no_grad():
        return seconds_of(forward, device), both


def _all_reduce(size: int, device: torch.device) -> float:
    numbers = torch.ones(size // 4, device=device)

    def most_of_any_rank(calls: int) -> int:
        # A rank that made fewer calls than another would leave it waiting in the others.
        return max(Ranks().on_all(lambda: calls))

    return seconds_of(lambda: dist.all_reduce(numbers), device, most_of_any_rank)


def _facts(name: str, device: torch.device, curves: dict[str, Curve]) -> tuple[Gpu, bool]:
    """The table's facts under the new name, or measured ones, and whether they were measured."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / GIB
        known = gpu_of_device(device_name(device), memory)
        if known is not None:
            return replace(GPUS[known], name=name, memory_gib=memory, per_node=per_node), False
    else:
        memory = usable_memory() / GIB / per_node
    rates = {kind: max(2e-12 * n**3 / s for n, s in curves[f"gemm_{kind}"]) for kind in _KINDS}
    element = 2 if device.type == "cuda" else 4
    inside = "all_reduce" in curves and dist.get_world_size() <= per_node
    link = _ring_rate(curves["all_reduce"]) if inside else GPUS["cpu"].link
    facts = Gpu(
        name=name,
        bf16_tflops=rates["bf16"],
        fp32_tflops=rates["fp32"],
        memory_gib=memory,
        bandwidth=_norm_rate(curves["norm"], element),
        link=link,
        per_node=per_node,
        source="measured",
        kind=device.type,
    )
    return facts, True


def _rates(
    facts: Gpu,
    is_measured: bool,
    sizes: Sizes,
    curves: dict[str, Curve],
    compute: torch.dtype,
    network: str | None,
) -> Rates:
    kind = "bf16" if compute is torch.bfloat16 else "fp32"
    peak = 1e12 * (facts.bf16_tflops if kind == "bf16" else facts.fp32_tflops)
    best = max(2 * n**3 / s for n, s in curves[f"gemm_{kind}"])
    smallest, seconds = curves[f"gemm_{kind}"][0]
    built_in = find_machine("h100-80gb" if compute is torch.bfloat16 else "cpu").rates
    slots, width = sizes.rows * sizes.length, _HEADS * _HEAD_SIZE
    flops = 4 * slots * sizes.length * width
    (_, forward, both), (_, _, plain_both) = curves["attention"]
    # The planner adds the time of attention's reads and writes to that of its products.
    moved = compute.itemsize * slots * 4 * width / (1e9 * facts.bandwidth * 0.95)
    forward_products = max(forward - moved, forward / 2)
    backward_products = max(
        both - forward - ATTENTION_BACKWARD_MOVES * moved, (both - forward) / 2, 1e-9
    )
    found = replace(
        built_in,
        gemm=best / peak,
        gemm_seconds=max(0.0, seconds - 2 * smallest**3 / best),
        attention_forward=flops / forward_products / peak,
        attention_backward=2.5 * flops / backward_products / peak,
        no_dropout=max(1.0, both / plain_both),
        elementwise=_norm_rate(curves["norm"], compute.itemsize) / facts.bandwidth,
    )
    if "all_reduce" not in curves:
        return found
    rate, ranks = _ring_rate(curves["all_reduce"]), dist.get_world_size()
    # As in `network.Group.sum`: the latencies of a ring or of a tree, whichever are fewer.
    latency = curves["all_reduce"][0][1] / min(2 * (1 + ranks / 16), 2 * math.log2(ranks))
    if dist.get_world_size() <= facts.per_node:
        share = 1.0 if is_measured else rate / facts.link
        return replace(found, link=share, link_latency=latency)
    across = find_machine("h100-80gb", facts.per_node, network).network
    return replace(found, network=rate / across.per_node, network_latency=latency)


def _norm_rate(curve: Curve, element_bytes: int) -> float:
    """GB/s of the largest norm."""
    tokens, seconds = curve[-1]
    return 5 * tokens * _HEADS * _HEAD_SIZE * element_bytes / seconds / 1e9


def _ring_rate(curve: Curve) -> float:
    """GB/s that each rank sends in the all-reduce with the highest rate."""
    ranks = dist.get_world_size()
    return max(2 * (ranks - 1) / ranks * size / seconds / 1e9 for size, seconds in curve)
