"""Training steps on packed rows: tokens a second, how near to the chip, memory, and what costs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from megatron_bert.benchmark.gemm import model_gemms, square_matmul_tflops, time_gemms
from megatron_bert.benchmark.kernel_shares import kernel_shares
from megatron_bert.benchmark.machine import Hardware, describe_hardware, describe_versions
from megatron_bert.benchmark.rows import keys_per_query, make_batches
from megatron_bert.benchmark.synthetic import Corpora
from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.flops import peak_tflops, row_flops
from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import RankModel, build_model
from megatron_bert.optim.adamw import ShardedAdamW
from megatron_bert.training.step import agree, take_step


@dataclass(frozen=True)
class StepWork:
    """What is measured.

    Attributes:
        config: model, layout, precision, compilation; its curriculum and data are not used.
        vocab_size: padded vocabulary.
        corpora: where the rows come from.
        seq_lengths: of the rows; a case each.
        micro_tokens: of a micro-batch, at most; a case each.
        dropouts: of hidden states and attention weights; None leaves the configuration's. A case
            each.
        micro_batches: of a step.
        steps: timed; warm-up steps come first.
        warm_up: steps before them, in which blocks are compiled.
        profiles: whether a further step is taken apart by kernels (CUDA).
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
        keys_per_query: slots that a slot attends to, on average.
        tokens_per_second: slots of all ranks.
        tflops_per_gpu: operations done, without those done again, 10^12 a second.
        mfu: their share of the device's dense BF16 peak; None where that is unknown.
        peak_memory_gb: allocated on the fullest device, 10^9 bytes; None on the CPU.
        step_seconds: mean of the timed steps.
        gemm_seconds: a step's matrix products alone, each timed by itself, attention's left out;
            None where ranks share the model.
        first_step_seconds: with compilation, of which the cache may hold parts.
        loss: of the last step.
        shares: of the device's time in a step, by kind of kernel; empty on the CPU.
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
    first_step_seconds: float
    loss: float
    shares: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepFigures:
    """All cases, and what they were measured on.

    Attributes:
        hardware: the machine.
        device: the GPU's name, or "cpu".
        ranks: processes.
        versions: of packages.
        quick: whether the work was cut short.
        matmul_tflops: of a plain product of 8192 x 8192 matrices (1024 x 1024 on the CPU) of the
            compute type on the same device.
        cases: in the order of measuring.
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


def measure_steps(
    work: StepWork, device: torch.device, quick: bool, say: Callable[[str], None]
) -> StepFigures:
    """Train for a few steps in every case; the process group has been started.

    Args:
        work: the cases.
        device: this rank's.
        quick: whether the work was cut short.
        say: is told what is being measured.

    Raises:
        torch.OutOfMemoryError: with several ranks, of which the others would wait for this one.
    """
    topology = Topology.of(work.config.parallel, device, work.config.distributed.timeout_seconds)
    hardware, versions = describe_hardware(), describe_versions()
    say("a plain matrix product")
    matmul = square_matmul_tflops(_compute_dtype(work.config), device)
    cases: list[StepCase] = []
    failed: dict[str, str] = {}
    for dropout in work.dropouts:
        config = _with_dropout(work.config, dropout)
        subject: _Subject | None = None
        for seq_length, micro_tokens in product(work.seq_lengths, work.micro_tokens):
            rows = max(1, micro_tokens // seq_length)
            name = f"length {seq_length}, {rows} rows, dropout {config.model.hidden_dropout:g}"
            say(name)
            try:
                subject = subject or _Subject.build(config, work.vocab_size, topology)
                cases.append(_measure_case(work, subject, seq_length, rows))
            except torch.OutOfMemoryError as error:
                if dist.get_world_size() > 1:
                    raise
                failed[name] = str(error).partition(". ")[0]
            if name in failed:
                # What the step left half-way is told no further case. Here, as the error holds
                # what the step had allocated.
                subject = None
                gc.collect()
                _free(device)
        subject = None
        _free(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    ranks = dist.get_world_size()
    return StepFigures(hardware, name, ranks, versions, quick, matmul, cases, failed)


def _with_dropout(config: Config, dropout: float | None) -> Config:
    if dropout is None:
        return config
    model = config.model.model_copy(
        update={"hidden_dropout": dropout, "attention_dropout": dropout}
    )
    return config.model_copy(update={"model": model})


@dataclass(frozen=True)
class _Subject:
    """A model in training."""

    config: Config
    vocab_size: int
    model: RankModel
    optimizer: ShardedAdamW

    @classmethod
    def build(cls, config: Config, vocab_size: int, topology: Topology) -> _Subject:
        model = build_model(config, vocab_size, topology)
        optimizer = ShardedAdamW(model.named_parameters(), config.optimizer, model.counts_here)
        return cls(config, vocab_size, model, optimizer)

    def step(self, batches: list[Batch]) -> torch.Tensor:
        """One step as training takes it; returns its loss, on the device."""
        agreement = agree(batches, False, self.model.topology)
        return take_step(self.model, self.optimizer, batches, agreement.masked_tokens, 1e-5).loss


def _measure_case(work: StepWork, subject: _Subject, seq_length: int, rows: int) -> StepCase:
    topology = subject.model.topology
    device, config = topology.device, subject.config
    batches = _batches(work, topology, seq_length, rows)
    _free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    loss = subject.step(batches)
    _wait(device)
    first_seconds = time.perf_counter() - begin
    for _ in range(work.warm_up - 1):
        subject.step(batches)
    _wait(device)
    begin = time.perf_counter()
    for _ in range(work.steps):
        loss = subject.step(batches)
    _wait(device)
    seconds = (time.perf_counter() - begin) / work.steps
    memory = _peak_memory(device)
    shares: dict[str, float] = {}
    kernels: dict[str, float] = {}
    if work.profiles and device.type == "cuda":
        shares, kernels = kernel_shares(lambda: subject.step(batches))
    slots = masked_slots(config.mlm.probability, config.mlm.unit, seq_length)
    seen = keys_per_query(batches)
    flops = row_flops(config.model, work.vocab_size, seq_length, slots, seen)
    # Every rank of a tensor- or pipeline-parallel group takes part in the same rows.
    rows_in_all = rows * work.micro_batches * topology.data_parallel_size
    ranks = dist.get_world_size()
    tflops = flops * rows_in_all / ranks / seconds / 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_tflops(name)
    gemms = model_gemms(config.model, work.vocab_size, rows * seq_length, rows * slots)
    gemm_seconds = None
    if topology.tensor_parallel.size * topology.pipeline_size == 1:
        seconds_alone = time_gemms(gemms, _compute_dtype(config), device) * work.micro_batches
        gemm_seconds = round(seconds_alone, 5)
    return StepCase(
        seq_length=seq_length,
        dropout=config.model.hidden_dropout,
        rows=rows,
        micro_batches=work.micro_batches,
        keys_per_query=round(seen, 1),
        tokens_per_second=round(rows_in_all * seq_length / seconds),
        tflops_per_gpu=round(tflops, 3),
        mfu=None if peak is None else round(tflops / peak, 4),
        peak_memory_gb=None if memory is None else round(memory, 2),
        step_seconds=round(seconds, 5),
        gemm_seconds=gemm_seconds,
        first_step_seconds=round(first_seconds, 2),
        loss=round(float(loss), 4),
        shares=shares,
        kernels=kernels,
    )


def _compute_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.precision.compute == "bf16" else torch.float32


def _batches(work: StepWork, topology: Topology, seq_length: int, rows: int) -> list[Batch]:
    """The micro-batches of a step, for this rank; the same ones are taken in every step."""
    first = topology.data_parallel_rank * work.micro_batches
    return make_batches(
        work.corpora,
        work.config.mlm,
        seq_length,
        rows,
        range(first, first + work.micro_batches),
        work.micro_batches * topology.data_parallel_size,
        pinned=topology.device.type == "cuda",
    )


def _peak_memory(device: torch.device) -> float | None:
    """Of the rank that allocated most, 10^9 bytes."""
    if device.type != "cuda":
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak) / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.get_world_size() > 1:
        dist.barrier()


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
