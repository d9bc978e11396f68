"""What a rank's training step really holds, counted storage by storage, and what is predicted.

A rank is built as training builds it, on a process group that sends nothing, and takes two steps on
the CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.schema import Config
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import build_model
from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import Layout, Split
from megatron_bert.planner.machines import find_machine
from megatron_bert.planner.memory import Memory, memory
from megatron_bert.training.optimizer import build_optimizer
from tests.parallel.rank_parts import without_the_harness_group
from tests.planner.storage_watch import StorageWatch
from tests.small_model import PackedInputs

VOCABULARY = 1024


@dataclass(frozen=True)
class Case:
    """A run of one stage and a layout of it."""

    name: str
    ranks: int = 1
    seq_length: int = 128
    rows: int = 16
    global_size: int = 32
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    compute: str = "fp32"
    reduce: str = "fp32"
    optimizer: str = "adamw"

    @property
    def config(self) -> Config:
        return Config.model_validate(
            {
                "run": {"dir": "unused"},
                "model": {
                    "num_layers": 4,
                    "hidden_size": 128,
                    "ffn_hidden_size": 344,
                    "num_attention_heads": 4,
                    "num_query_groups": 1,
                    "max_position_embeddings": 512,
                    "vocab_size": VOCABULARY,
                    **self.model,
                },
                "data": {"tokenizer": "unused", "train": [{"prefix": "unused"}]},
                "curriculum": [{"seq_length": self.seq_length, "steps": 1}],
                "batch": {
                    "global_size": self.global_size,
                    "micro_tokens": self.rows * self.seq_length,
                },
                "precision": {"compute": self.compute, "reduce": self.reduce},
                "optimizer": {"name": self.optimizer},
                "parallel": self.parallel,
                "recompute": self.recompute,
            }
        )

    def predict(self) -> Memory[float]:
        """By the planner."""
        config, parallel = self.config, self.config.parallel
        interleaved = parallel.pipeline > 1 and parallel.pipeline_schedule != "1f1b"
        split = Split(
            parallel.tensor,
            parallel.sequence,
            parallel.pipeline,
            parallel.pipeline_schedule if parallel.pipeline > 1 else "1f1b",
            parallel.virtual_stages if interleaved else 1,
            self.ranks // (parallel.tensor * parallel.pipeline),
        )
        layout = Layout(
            split,
            self.rows * self.seq_length,
            config.recompute,
            parallel.replicate,
            parallel.reshard_after_forward,
        )
        job = Job(config, VOCABULARY, find_machine("cpu"), self.ranks)
        return memory(job, layout, job.spans[0])


def measure(cases: Sequence[Case]) -> list[float]:
    """The peaks of the fullest ranks, in bytes."""
    with without_the_harness_group():
        return [max(_measure(case, rank) for rank in _ends_of_pipeline(case)) for case in cases]


def _ends_of_pipeline(case: Case) -> list[int]:
    pipeline = case.config.parallel.pipeline
    of_stage = case.ranks // pipeline
    return sorted({stage * of_stage for stage in (0, 1, pipeline - 1) if stage < pipeline})


def _measure(case: Case, rank: int) -> float:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=case.ranks)
    try:
        return _peak(case)
    finally:
        dist.destroy_process_group()
        gc.collect()


def _peak(case: Case) -> float:
    config = case.config
    topology = Topology.of(config.parallel, torch.device("cpu"))
    model = build_model(config, VOCABULARY, topology)
    optimizer = build_optimizer(config, model)
    job = Job(config, VOCABULARY, find_machine("cpu"), case.ranks)
    span = job.spans[0]
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    batch = BatchLayout.of(
        config, span.global_size, span.seq_length, case.ranks // (tensor * pipeline)
    )
    micro_batches = [
        _inputs(batch.micro_size, span.seq_length, span.masked_slots)
        for _ in range(batch.num_micro_batches)
    ]
    held = [*model.named_parameters().values(), *optimizer.state_tensors().values()]
    with StorageWatch(held) as watch:
        for _ in range(2):
            model.runner.train(micro_batches, torch.ones(()))
            model.sum_shared_gradients()
            optimizer.step(1e-3)
    return float(watch.peak)


def _inputs(rows: int, slots: int, masked: int) -> PackedInputs:
    return PackedInputs(
        tokens=torch.randint(8, VOCABULARY, (rows, slots), dtype=torch.int32),
        positions=torch.arange(slots, dtype=torch.int32).expand(rows, slots).contiguous(),
        masked=torch.arange(masked, dtype=torch.int32).expand(rows, masked).contiguous(),
        labels=torch.randint(8, VOCABULARY, (rows, masked), dtype=torch.int32),
        weights=torch.ones(rows, masked),
        rows=torch.arange(rows),
    )
