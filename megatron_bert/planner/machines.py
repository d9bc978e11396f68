"""Facts about GPUs and networks, and the share of their peaks that training reaches.

The facts are figures from data sheets. The shares are this project's own, measured on one H100
(docs/performance.md) or, where nothing was measured, assumed (docs/scaling.md says which is which).
`tools/plan.py --calibrate` measures a machine's own shares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from megatron_bert.command_line.arguments import argument
from megatron_bert.config.flops import PEAK_TFLOPS
from megatron_bert.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU (or the CPU in place of one).

    Attributes:
        name: as the command line takes it.
        bf16_tflops: dense BF16 peak.
        fp32_tflops: FP32 peak of the vector units, which `precision.compute=fp32` uses.
        memory_gib: the most that a process can allocate, without subtracting the context.
        bandwidth: of its memory, GB/s.
        link: to the other GPUs of its node, GB/s in one direction.
        per_node: default number of GPUs per node.
        source: where the figures come from.
        kind: `cuda` or `cpu`.
    """

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    bandwidth: float
    link: float
    per_node: int
    source: str
    kind: str = "cuda"


_H100_TFLOPS, _A100_TFLOPS = PEAK_TFLOPS["H100"], PEAK_TFLOPS["A100"]
_H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet, SXM (half of the rates with sparsity)"
_A100_SHEET = "NVIDIA A100 Tensor Core GPU data sheet, SXM"

# NVLink: half of the data sheet's figure, which sums both directions. Memory: as the driver shows.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("h100-80gb", _H100_TFLOPS, 67.0, 79.1, 3350.0, 450.0, 8, _H100_SHEET),
            # TSUBAME 4's: four to a node.
            Gpu(
                "h100-94gb",
                _H100_TFLOPS,
                67.0,
                93.1,
                2400.0,
                450.0,
                4,
                "TSUBAME 4.0 hardware page; Lenovo Press LP1732 (H100 SXM5 94 GB HBM2e)",
            ),
            Gpu(
                "h200",
                PEAK_TFLOPS["H200"],
                67.0,
                139.8,
                4800.0,
                450.0,
                8,
                "NVIDIA H200 data sheet, SXM",
            ),
            Gpu("a100-80gb", _A100_TFLOPS, 19.5, 79.1, 2039.0, 300.0, 8, _A100_SHEET),
            Gpu("a100-40gb", _A100_TFLOPS, 19.5, 39.4, 1555.0, 300.0, 8, _A100_SHEET),
            # A stand-in for any host: rough figures for a core or two of a server.
            Gpu("cpu", 0.05, 0.1, 8.0, 10.0, 2.0, 1, "assumed, not measured", "cpu"),
        )
    }
)

# A driver shows at least this share of a whole card's memory; less means a part of a card.
_WHOLE = 0.9
# Words in the driver's name of a device that is not a whole SXM module.
_OTHER_CARDS = frozenset({"pcie", "nvl", "mig", "grid"})


@dataclass(frozen=True)
class Network:
    """What connects nodes.

    Attributes:
        name: as the command line takes it.
        per_node: GB/s that a node sends in one direction, over all its adapters.
    """

    name: str
    per_node: float


# Gbit/s of one adapter (InfiniBand Trade Association's names; Ethernet by its rate).
_ADAPTERS: Mapping[str, int] = MappingProxyType(
    {
        "edr100": 100,
        "hdr100": 100,
        "hdr200": 200,
        "ndr200": 200,
        "ndr400": 400,
        "xdr800": 800,
        "eth10": 10,
        "eth25": 25,
        "eth100": 100,
        "eth200": 200,
        "eth400": 400,
    }
)


@dataclass(frozen=True)
class Rates:
    """The share of the facts that training reaches, and its overheads.

    Attributes:
        gemm: share of the peak in large products.
        gemm_seconds: fixed additional seconds of each product.
        attention_forward: share of the peak in attention's products, with dropout.
        attention_backward: the same in the backward pass.
        no_dropout: how many times as fast attention is without dropout.
        elementwise: share of the memory's bandwidth in norms, activations, sums and the optimizer.
        fused: the same between the products of blocks with fused kernels.
        eager: how many times as many bytes move in blocks that are neither fused nor compiled.
        link: share of the bandwidth of the links inside a node.
        network: share of the bandwidth of the adapters.
        link_latency: seconds of a message inside a node, plus a 16th of it for each rank.
        network_latency: the same across nodes.
        idle: seconds per block and micro-batch in which the device waits.
        idle_recorded: the same for recorded passes, which the host does not limit.
        host: seconds that the host takes to launch a block, forward and backward: the minimum time
            of a block, however few its tokens; a third more if it is recomputed.
        host_compiled: the same for compiled blocks.
        host_message: additional seconds of the host for each message over a tensor-parallel group.
        step: seconds per step outside the model: ranks agree, metrics are written.
        reserved_gib: memory that training cannot use: context, communicators, fragments.
    """

    # One H100 80 GB, by docs/performance.md: 26 November 2026 (commits 615cc3d, a5f806f) and, on a
    # card 4 % slower, 27 November (commit ec2cbf4). Products: between the two.
    gemm: float = 0.76
    gemm_seconds: float = 10e-6
    # 27 November: the kernels' times at lengths 128, 512 and 2,048.
    attention_forward: float = 0.335
    attention_backward: float = 0.26
    # 26 November, as are the next one and `idle`.
    no_dropout: float = 1.4
    elementwise: float = 0.64
    # 27 November: 5.2 GB a layer and micro-batch of 32,768 slots in 1.95 ms.
    fused: float = 0.8
    # Assumed, like all values without a run.
    eager: float = 2.5
    link: float = 0.8
    network: float = 0.85
    link_latency: float = 10e-6
    network_latency: float = 25e-6
    idle: float = 0.3e-3
    # 27 November (commit 6d76a3a): 0.11 to 0.21 ms with micro-batches of 4,096 to 32,768 slots.
    idle_recorded: float = 0.2e-3
    # The same: 192 blocks of 4,096 and 8,192 slots in 0.85 to 0.94 s.
    host: float = 4.5e-3
    # 27 November (commit ec2cbf4), 4,096 slots of length 128: a step of 0.529 s for 96 blocks.
    host_compiled: float = 5.3e-3
    host_message: float = 40e-6
    step: float = 2e-3
    reserved_gib: float = 2.5


@dataclass(frozen=True)
class Machine:
    """The cluster that is planned for.

    Attributes:
        gpu: its GPUs.
        network: between its nodes.
        gpus_per_node: GPUs of a node.
        rates: what training reaches of its peaks.
    """

    gpu: Gpu
    network: Network
    gpus_per_node: int
    rates: Rates = Rates()

    @property
    def usable_bytes(self) -> float:
        """Bytes of a GPU's memory that training can use."""
        return (self.gpu.memory_gib - self.rates.reserved_gib) * GIB

    def with_memory(self, gib: float) -> Machine:
        """The same machine with another amount of memory per GPU."""
        return replace(self, gpu=replace(self.gpu, memory_gib=gib))

    def peak(self, compute: str) -> float:
        """FLOP/s of a GPU in a compute dtype."""
        return 1e12 * (self.gpu.bf16_tflops if compute == "bf16" else self.gpu.fp32_tflops)


def find_machine(gpu: str, nodes_of: int | None = None, network: str | None = None) -> Machine:
    """Look up a machine by the names that the command line takes.

    Args:
        gpu: a name of `GPUS`.
        nodes_of: GPUs of a node. Default: the usual number of that GPU.
        network: an adapter and how many of them a node has, such as `ndr200x4`. Default: an
            `ndr200` for each GPU.

    Raises:
        ConfigError: A name is unknown (the message lists the known ones), or a number is not above
            0.
    """
    if gpu not in GPUS:
        raise ConfigError(f"{argument('gpu', gpu)}: not known; use one of {', '.join(GPUS)}")
    if nodes_of is not None and nodes_of < 1:
        raise ConfigError(
            f"{argument('nodes_of', nodes_of)}: a node has at least 1 GPU; give their number"
        )
    per_node = GPUS[gpu].per_node if nodes_of is None else nodes_of
    default = f"eth10x{per_node}" if gpu == "cpu" else f"ndr200x{per_node}"
    found = find_network(network or default)
    return Machine(GPUS[gpu], found, per_node, _default_rates(gpu))


def _default_rates(gpu: str) -> Rates:
    if gpu != "cpu":
        return Rates()
    # Attention that writes its scores is ordinary products; a rank is a process without a context.
    return Rates(
        gemm=0.6, attention_forward=0.3, attention_backward=0.3, no_dropout=3.0, eager=2.0,
        link_latency=100e-6, network_latency=200e-6, idle=0.0, idle_recorded=0.0,
        host=1e-3, host_compiled=1e-3, reserved_gib=0.5,
    )  # fmt: skip


def find_network(name: str, named_by: str | None = None) -> Network:
    """Look up a network by a name such as `ndr200x4`: an adapter and how many a node has.

    Args:
        name: what the user gave.
        named_by: the option or key that it was given with, for the error message. Default: the
            argument `network`.

    Raises:
        ConfigError: The name is unknown; the message lists the adapters.
    """
    match = re.fullmatch(r"([a-z]+\d+)x(\d+)", name)
    if match is None or match[1] not in _ADAPTERS or not int(match[2]):
        raise ConfigError(
            f"network {name} of {named_by or argument('network')} is not known; give an adapter "
            f"and how many of them a node has, as ndr200x4; adapters are {', '.join(_ADAPTERS)}"
        )
    return Network(name, _ADAPTERS[match[1]] * int(match[2]) / 8)


def gpu_of_device(device_name: str, memory_gib: float) -> str | None:
    """The name in `GPUS` of a device such as "NVIDIA H100 80GB HBM3"; None if it is not there.

    The table's cards are SXM modules: PCIe and NVL cards, superchips (GH200) and parts of a card
    (MIG, vGPU) have other peaks, memories and links.

    Args:
        device_name: the driver's name for it.
        memory_gib: its memory, which distinguishes models of the same name.
    """
    words = set(re.split(r"[\s-]+", device_name.lower()))
    model = next((name for name in ("h200", "h100", "a100") if name in words), None)
    if model is None or words & _OTHER_CARDS:
        return None
    alike = [gpu for gpu in GPUS.values() if gpu.name.startswith(model)]
    nearest = min(alike, key=lambda gpu: abs(gpu.memory_gib - memory_gib))
    return nearest.name if memory_gib > _WHOLE * nearest.memory_gib else None
