"""Training steps on packed rows: tokens a second, share of the chip's peak, memory, and costs."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist

from megatron_bert.benchmark.gemm import model_gemms, square_matmul_tflops, time_gemms
from megatron_bert.benchmark.machine import describe_hardware, describe_versions
from megatron_bert.benchmark.rows import keys_per_query, make_batches
from megatron_bert.benchmark.step.alone import time_attention, time_softmax
from megatron_bert.benchmark.step.figures import StepCase, StepFigures, StepWork
from megatron_bert.benchmark.step.kernel_shares import DeviceTime, time_kernels
from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.flops import peak_tflops, row_flops
from megatron_bert.config.schema import BatchConfig, Config
from megatron_bert.data.batch import Batch
from megatron_bert.distributed.device_facts import device_name
from megatron_bert.distributed.device_work import wait_for_device
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import DTYPES, RankModel, build_model
from megatron_bert.optim.sharded import ShardedOptimizer
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.step import StepResult, agree, take_step


def measure_steps(
    work: StepWork, device: torch.device, quick: bool, say: Callable[[str], None]
) -> StepFigures:
    """Train for a few steps in every case; the process group has been started.

    Args:
        work: the cases.
        device: this rank's.
        quick: whether the work was cut short.
        say: called with what is being measured.

    Raises:
        torch.OutOfMemoryError: with several ranks, because the others would wait for this one.
    """
    topology = Topology.of(work.config.parallel, device, work.config.distributed.timeout_seconds)
    hardware, versions = describe_hardware(), describe_versions()
    say("a plain matrix product")
    matmul = square_matmul_tflops(DTYPES[work.config.precision.compute], device)
    cases: list[StepCase] = []
    failed: dict[str, str] = {}
    for dropout in work.dropouts:
        config = with_dropout(work.config, dropout)
        subject: StepSubject | None = None
        for seq_length, micro_tokens in product(work.seq_lengths, work.micro_tokens):
            rows = BatchConfig.rows_in(micro_tokens, seq_length)
            name = f"length {seq_length}, {rows} rows, dropout {config.model.hidden_dropout:g}"
            say(name)
            try:
                subject = subject or StepSubject.build(config, work.vocab_size, topology)
                cases.append(_measure_case(work, subject, seq_length, rows))
                # So that figures are not lost if the run is cut off.
                say(f"{name}: {cases[-1].tokens_per_second:,} tokens/s")
            except torch.OutOfMemoryError as error:
                if dist.get_world_size() > 1:
                    raise
                failed[name] = str(error).partition(". ")[0]
            if name in failed:
                # No further case uses the state that the failed step left. Done here, after the
                # handler, because the error keeps what the step had allocated.
                subject = None
                release_memory(device)
        subject = None
        release_memory(device)
    name = device_name(device)
    ranks = dist.get_world_size()
    return StepFigures(hardware, name, ranks, versions, quick, matmul, cases, failed)


def with_dropout(config: Config, dropout: float | None) -> Config:
    """The configuration with both dropout rates replaced; None keeps them."""
    if dropout is None:
        return config
    return config.with_keys({"model.hidden_dropout": dropout, "model.attention_dropout": dropout})


@dataclass(frozen=True)
class StepSubject:
    """A model in training, and its optimizer."""

    config: Config
    vocab_size: int
    model: RankModel
    optimizer: ShardedOptimizer

    @classmethod
    def build(cls, config: Config, vocab_size: int, topology: Topology) -> StepSubject:
        """Make both, with the configuration's random weights."""
        model = build_model(config, vocab_size, topology)
        optimizer = build_optimizer(config, model)
        return cls(config, vocab_size, model, optimizer)

    def step(self, batches: list[Batch]) -> StepResult:
        """Take one step as training does."""
        agreement = agree(batches, False, self.model.topology)
        return take_step(self.model, self.optimizer, batches, agreement.masked_tokens, 1e-5)


def _measure_case(work: StepWork, subject: StepSubject, seq_length: int, rows: int) -> StepCase:
    topology = subject.model.topology
    device, config = topology.device, subject.config
    batches = _batches(work, topology, seq_length, rows)
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    result = subject.step(batches)
    wait_for_ranks(device)
    first_seconds = time.perf_counter() - begin
    for _ in range(work.warm_up - 1):
        subject.step(batches)
    wait_for_ranks(device)
    begin = time.perf_counter()
    for _ in range(work.steps):
        result = subject.step(batches)
    wait_for_ranks(device)
    seconds = (time.perf_counter() - begin) / work.steps
    memory = _peak_memory(device)
    profiled: DeviceTime | None = None
    if work.profiles and device.type == "cuda":
        profiled = time_kernels(lambda: subject.step(batches))
    slots = masked_slots(config.mlm.probability, config.mlm.unit, seq_length)
    seen = keys_per_query(batches)
    flops = row_flops(config.model, work.vocab_size, seq_length, slots, seen)
    # Every rank of a tensor- or pipeline-parallel group takes part in the same rows.
    rows_in_all = rows * work.micro_batches * topology.data_parallel_size
    ranks = dist.get_world_size()
    tflops = flops * rows_in_all / ranks / seconds / 1e12
    name = device_name(device)
    peak = peak_tflops(name)
    alone: tuple[float | None, ...] = (None, None, None)
    if topology.tensor_parallel.size * topology.pipeline_size == 1:
        alone = _seconds_alone(work, config, batches[0], rows * slots, device)
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
        gemm_seconds=alone[0],
        attention_seconds=alone[1],
        softmax_seconds=alone[2],
        first_step_seconds=round(first_seconds, 2),
        loss=round(result.read(math.inf).loss, 4),
        profiled_seconds=None if profiled is None else round(profiled.seconds, 5),
        shares={} if profiled is None else profiled.kinds,
        kernels={} if profiled is None else profiled.kernels,
    )


def _seconds_alone(
    work: StepWork, config: Config, batch: Batch, masked: int, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of a step's matrix products, attention and softmax, each timed by itself."""
    model, dtype = config.model, DTYPES[config.precision.compute]
    gemms = model_gemms(model, work.vocab_size, batch.tokens_BS.numel(), masked)
    seconds = (
        time_gemms(gemms, dtype, device),
        time_attention(model, batch, dtype, device),
        time_softmax(masked, work.vocab_size, dtype, device),
    )
    products, attention, softmax = (round(s * work.micro_batches, 5) for s in seconds)
    return products, attention, softmax


def _batches(work: StepWork, topology: Topology, seq_length: int, rows: int) -> list[Batch]:
    """This rank's micro-batches of a step; the same ones are used in every step."""
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
    """Peak memory of the rank that allocated most, 10^9 bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak) / 1e9


def wait_for_ranks(device: torch.device) -> None:
    """Wait until all launched work is done, on all ranks."""
    wait_for_device(device)
    if dist.get_world_size() > 1:
        dist.barrier()


def release_memory(device: torch.device) -> None:
    """Free unused memory: a sharded model has reference cycles, so it must be collected."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
