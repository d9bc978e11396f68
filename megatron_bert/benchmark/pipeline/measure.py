"""How long the ranks of a pipeline wait, compared with predictions.

Schedule, executor and messages are those of training. A stage sleeps for a fixed time instead of
computing, so that ranks do not compete for cores and only the order of the work is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.benchmark.machine import Hardware, describe_hardware, describe_versions
from megatron_bert.config.pipeline_schedules import SCHEDULES, ScheduleName
from megatron_bert.distributed.topology import Topology
from megatron_bert.parallel.actions import StageTime
from megatron_bert.parallel.data_parallel import ShardedModel
from megatron_bert.parallel.deferred import WeightProducts, WeightQueue
from megatron_bert.parallel.micro_batches import HeadOutput
from megatron_bert.parallel.pipeline import Pipeline
from megatron_bert.parallel.schedule import make_schedule, simulate

_HIDDEN = 8
_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class PipelineWork:
    """What is measured.

    Attributes:
        ranks: of the pipeline.
        micro_batches: of a step.
        virtual_stages: parts that a rank holds under interleaved schedules.
        seconds: a rank's time for a micro-batch's forward pass; backward to the input and backward
            to the weights take as long each.
        steps: number of measured steps, after a first one that is left out.
    """

    ranks: int
    micro_batches: int
    virtual_stages: int
    seconds: float
    steps: int


FULL = PipelineWork(ranks=4, micro_batches=16, virtual_stages=2, seconds=0.1, steps=3)
QUICK = PipelineWork(ranks=2, micro_batches=4, virtual_stages=2, seconds=0.001, steps=2)


@dataclass(frozen=True)
class ScheduleFigures:
    """One schedule; idle shares are the share of the ranks' time that they spend waiting.

    Attributes:
        name: of the schedule.
        measured_idle_share: in the fastest step.
        simulated_idle_share: according to `parallel.schedule.simulate`.
        formula_idle_share: (p - 1) / (v m + p - 1); None for zero bubble, which has no such simple
            formula.
        step_seconds: of the fastest step.
    """

    name: str
    measured_idle_share: float
    simulated_idle_share: float
    formula_idle_share: float | None
    step_seconds: float


@dataclass(frozen=True)
class PipelineFigures:
    """All schedules, what they were measured on, and whether the work was cut short."""

    hardware: Hardware
    versions: dict[str, str]
    quick: bool
    work: PipelineWork
    schedules: list[ScheduleFigures]

    def document(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self)


def measure_pipeline(work: PipelineWork, say: Callable[[str], None]) -> PipelineFigures:
    """Start the ranks and time steps of every schedule.

    Args:
        work: how many ranks and micro-batches.
        say: called with what is being measured.
    """
    hardware, versions = describe_hardware(), describe_versions()
    schedules = []
    for name in SCHEDULES:
        say(f"pipeline of {work.ranks} ranks, {name}")
        schedules.append(_measure_schedule(name, work))
    return PipelineFigures(hardware, versions, work is QUICK, work, schedules)


def _measure_schedule(name: ScheduleName, work: PipelineWork) -> ScheduleFigures:
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="megatron_bert_benchmark_") as folder,
        ProcessPoolExecutor(work.ranks, mp_context=context) as ranks,
    ):
        futures = [
            ranks.submit(_time_steps, rank, name, work, Path(folder) / "rendezvous")
            for rank in range(work.ranks)
        ]
        seconds = max(future.result() for future in futures)
    stages = _virtual_stages(name, work)
    schedule = make_schedule(name, work.ranks, work.micro_batches, stages)
    busy = 3 * work.seconds * work.micro_batches
    fill = work.ranks - 1
    formula = fill / (stages * work.micro_batches + fill)
    return ScheduleFigures(
        name=name,
        measured_idle_share=round(1.0 - busy / seconds, 4),
        simulated_idle_share=round(
            simulate(schedule, [StageTime()] * schedule.num_stages).idle_share, 4
        ),
        formula_idle_share=None if SCHEDULES[name].splits_backward else round(formula, 4),
        step_seconds=round(seconds, 4),
    )


def _virtual_stages(name: ScheduleName, work: PipelineWork) -> int:
    return work.virtual_stages if SCHEDULES[name].interleaves else 1


def _time_steps(rank: int, name: ScheduleName, work: PipelineWork, rendezvous: Path) -> float:
    """Seconds of the shortest step, from when all ranks begin until all are done."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=work.ranks,
        timeout=_TIMEOUT,
    )
    topology = Topology.build(torch.device("cpu"), pipeline=work.ranks)
    count = _virtual_stages(name, work)
    stages = [_SleepingStage(rank + part * work.ranks, work, count) for part in range(count)]
    chunks = [ShardedModel(stage, list(stage.layers), topology, torch.float32) for stage in stages]
    pipeline = Pipeline(chunks, name, topology, _HIDDEN, torch.float32)
    micro_batches = [(torch.zeros(1, 1),) for _ in range(work.micro_batches)]
    seconds = []
    for _ in range(work.steps + 1):
        dist.barrier()
        begin = time.perf_counter()
        pipeline.train(micro_batches, torch.ones(()))
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    return min(seconds[1:])


class _SleepingStage(nn.Module):
    """A stage of one layer; the last stage's output has the form of the head's."""

    def __init__(self, number: int, work: PipelineWork, virtual_stages: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_SleepingLayer(work.seconds / virtual_stages)])
        self.scale = nn.Parameter(torch.ones(1))
        self.is_first = number == 0
        self.is_last = number == work.ranks * virtual_stages - 1

    def forward(self, inputs: Tensor) -> Tensor | HeadOutput:
        """[1, 1] or hidden states [1, D] -> [1, D], or the head's output."""
        x_1D = inputs.expand(1, _HIDDEN) if self.is_first else inputs
        y_1D: Tensor = self.layers[0](x_1D * self.scale)
        return HeadOutput(y_1D[0, 0], y_1D[0, 1:].detach()) if self.is_last else y_1D


class _SleepingLayer(nn.Module):
    """A layer that takes fixed times; defers its weight's part if it is asked to."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.deferred: WeightQueue | None = None
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Return the same values, after the fixed time."""
        weight = self.weight if self.deferred is None else self.weight.detach()
        y: Tensor = _Sleep.apply(x, weight, self)  # type: ignore[no-untyped-call]
        return y


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: _SleepingLayer) -> Tensor:
        ctx.layer = layer
        time.sleep(layer.seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: _SleepingLayer = ctx.layer
        time.sleep(layer.seconds)
        weight_grad = None
        if layer.deferred is None:
            time.sleep(layer.seconds)
            weight_grad = torch.zeros(1)
        else:
            layer.deferred.append(cast(WeightProducts, _SleepingProducts([layer])))
        return grads[0].clone(), weight_grad, None


@dataclass(frozen=True)
class _SleepingProducts:
    """Stand-in for the products that a layer defers."""

    layers: list[_SleepingLayer]

    def gather(self) -> Tensor:
        """Return an empty tensor: there is nothing to gather."""
        return torch.empty(0)

    def compute(self, gathering: Tensor) -> list[Tensor]:
        """Sleep for the fixed time."""
        time.sleep(self.layers[0].seconds)
        return [torch.zeros(1)]
