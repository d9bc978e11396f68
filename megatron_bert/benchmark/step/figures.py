"""What is measured about training steps, and the resulting figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_bert.benchmark.machine import Hardware
from megatron_bert.benchmark.synthetic import Corpora
from megatron_bert.config.schema import Config


@dataclass(frozen=True)
class StepWork:
    """What is measured.

    Attributes:
        config: model, layout, precision, compilation; its curriculum and data are not used.
        vocab_size: padded vocabulary.
        corpora: where the rows come from.
        seq_lengths: of the rows; one case each.
        micro_tokens: maximum tokens of a micro-batch; one case each.
        dropouts: of hidden states and attention weights; None keeps the configuration's. One case
            each.
        micro_batches: of a step.
        steps: number of timed steps, after the warm-up.
        warm_up: number of steps before them, in which blocks are compiled.
        profiles: whether a further step is broken down by kernels, after one in which the profiler
            starts (CUDA).
    """

    config: Config
    vocab_size: int
    corpora: Corpora
    seq_lengths: Sequence[int]
    micro_tokens: Sequence[int]
    dropouts: Sequence[float | None]
    micro_batches: int = 4
    steps: int = 5
    warm_up: int = 3
    profiles: bool = True


@dataclass(frozen=True)
class StepCase:
    """One shape of rows.

    Attributes:
        seq_length: slots of a row.
        dropout: of hidden states.
        rows: of a micro-batch.
        micro_batches: of a step on a rank.
        keys_per_query: average number of slots that a slot attends to.
        tokens_per_second: slots of all ranks.
        tflops_per_gpu: 10^12 operations a second, without recomputation.
        mfu: their share of the device's dense BF16 peak; None if that is unknown.
        peak_memory_gb: allocated on the fullest device, 10^9 bytes; None on the CPU.
        step_seconds: mean of the timed steps.
        gemm_seconds: a step's matrix products, each timed by itself, without attention's; None if
            ranks share the model.
        attention_seconds: the same for attention, with the kernel that training uses.
        softmax_seconds: the same for the cross-entropy over the vocabulary.
        first_step_seconds: including compilation, parts of which may come from the cache.
        loss: of the last step.
        profiled_seconds: of a further step under the profiler, from the beginning of its first
            kernel to the end of its last one; None on the CPU.
        shares: of that time, by kind of kernel, including "idle"; empty on the CPU.
        kernels: the kernels that take longest, with their shares.
    """

    seq_length: int
    dropout: float
    rows: int
    micro_batches: int
    keys_per_query: float
    tokens_per_second: int
    tflops_per_gpu: float
    mfu: float | None
    peak_memory_gb: float | None
    step_seconds: float
    gemm_seconds: float | None
    attention_seconds: float | None
    softmax_seconds: float | None
    first_step_seconds: float
    loss: float
    profiled_seconds: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepFigures:
    """All cases, and what they were measured on.

    Attributes:
        hardware: the machine.
        device: the GPU's name, or "cpu".
        ranks: number of processes.
        versions: of packages.
        quick: whether the work was cut short.
        matmul_tflops: of a plain product of 8192 x 8192 matrices (1024 x 1024 on the CPU) of the
            compute dtype on the same device.
        cases: in the order in which they were measured.
        failed: cases that were not measured, and why.
    """

    hardware: Hardware
    device: str
    ranks: int
    versions: dict[str, str]
    quick: bool
    matmul_tflops: float
    cases: list[StepCase]
    failed: dict[str, str]

    def document(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self)
