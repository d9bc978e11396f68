"""What `kernels: auto` stands for, by configuration and device."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from megatron_bert.config.kernels import (
    ComputeDevice,
    chosen_kernels,
    fp8_changes,
    records_passes,
)
from megatron_bert.config.load import load_config
from megatron_bert.distributed import device_facts
from megatron_bert.distributed.device_facts import facts_at_hand, facts_of
from megatron_bert.training.optimizer import build_optimizer
from tests.distributed_harness import run_ranks
from tests.planner.jobs import EXAMPLE, job
from tests.small_model import cpu_topology, packed_inputs, small_config, small_model

H100 = ComputeDevice("cuda", (9, 0))
A100 = ComputeDevice("cuda", (8, 0))
T4 = ComputeDevice("cuda", (7, 5))
WITHOUT_TRITON = ComputeDevice("cuda", (9, 0), has_triton=False)
PLANNED = ComputeDevice("cuda")
CPU = ComputeDevice("cpu")


@pytest.mark.parametrize(
    ("keys", "device", "kernels"),
    [
        ((), H100, "fused"),
        ((), A100, "fused"),
        ((), PLANNED, "fused"),
        (("model.architecture=modernbert", "model.num_query_groups=24"), H100, "fused"),
        (("parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble"), H100, "fused"),
        (("recompute=full",), H100, "fused"),
        ((), T4, "torch"),
        ((), WITHOUT_TRITON, "torch"),
        ((), CPU, "torch"),
        (("run.device=cuda",), H100, "fused"),
        (("run.device=cpu",), H100, "torch"),
        (("run.device=cpu",), PLANNED, "torch"),
        (("precision.compute=fp32",), H100, "torch"),
        (("precision.fp8=current",), H100, "fused"),
        (("precision.fp8=current", "parallel.tensor=2"), H100, "torch"),
        (("compile.enabled=true",), H100, "torch"),
        # What is asked for by name is what is taken, or refused elsewhere.
        (("kernels=torch",), H100, "torch"),
        (("kernels=te",), H100, "te"),
        (("kernels=apex", "compile.enabled=true"), H100, "apex"),
        (("kernels=fused",), T4, "fused"),
    ],
)
def test_auto_stands_for_fused_kernels_where_nothing_speaks_against_them(
    keys: tuple[str, ...], device: ComputeDevice, kernels: str
) -> None:
    assert chosen_kernels(load_config(EXAMPLE, keys), device) == kernels


@pytest.mark.parametrize(
    ("keys", "device", "is_recorded"),
    [
        ((), H100, True),
        ((), PLANNED, True),
        ((), T4, True),
        ((), WITHOUT_TRITON, True),
        ((), CPU, False),
        (("run.device=cpu",), H100, False),
        (("kernels=torch",), H100, True),
        (("precision.compute=fp32",), H100, True),
        (("precision.fp8=current",), H100, True),
        (("recompute=full",), H100, True),
        (("recompute=selective",), H100, True),
        (("optimizer.name=muon", "run.deterministic=true"), H100, True),
        (("parallel.replicate=2", "precision.reduce=bf16"), H100, True),
        (("parallel.tensor=2",), H100, False),
        (("parallel.pipeline=2",), H100, False),
        (("parallel.reshard_after_forward=true",), H100, False),
        (("compile.enabled=true",), H100, False),
        (("kernels=te",), H100, False),
        (("kernels=apex",), H100, False),
        # What is asked for is what is taken, or refused elsewhere.
        (("compile.cuda_graphs=false",), H100, False),
        (("compile.cuda_graphs=true",), H100, True),
        (("compile.cuda_graphs=true",), CPU, True),
    ],
)
def test_passes_are_recorded_on_cuda_wherever_nothing_speaks_against_it(
    keys: tuple[str, ...], device: ComputeDevice, is_recorded: bool
) -> None:
    assert records_passes(load_config(EXAMPLE, keys), device) == is_recorded


@pytest.mark.parametrize(
    ("old", "keys", "before", "after"),
    [
        ({}, (), None, None),
        ({"kernels": "auto"}, ("kernels=fused",), None, None),
        ({"kernels": "torch"}, (), "torch", "fused"),
        ({"kernels": "auto", "parallel": {"tensor": 1}}, ("parallel.tensor=2",), "fused", "torch"),
        ({"compile": {"enabled": True}}, ("kernels=apex",), None, None),
        ({"kernels": "te"}, ("kernels=torch",), "te", "torch"),
    ],
)
def test_a_run_in_fp8_goes_on_with_the_same_products_in_it(
    old: dict[str, Any], keys: tuple[str, ...], before: str | None, after: str | None
) -> None:
    config = load_config(EXAMPLE, ("precision.fp8=current", *keys))
    problems = list(fp8_changes(old, config, H100))
    assert len(problems) == (before is not None)
    for problem in problems:
        assert f"with kernels = {after} other products are in FP8 than with {before}" in problem
        assert "restore these, or branch off" in problem
    assert not list(fp8_changes(old, load_config(EXAMPLE, keys), H100))


def test_a_device_tells_what_kernels_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(device_facts, "find_spec", lambda _: object())
    assert facts_of(gpu) == H100
    monkeypatch.setattr(device_facts, "find_spec", lambda _: None)
    assert facts_of(gpu) == WITHOUT_TRITON
    assert facts_of(torch.device("cpu")) == CPU


def test_a_run_that_is_prepared_elsewhere_counts_on_the_gpus_that_it_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [facts_at_hand(name) for name in ("auto", "cpu", "cuda")] == [CPU, CPU, PLANNED]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(device_facts, "find_spec", lambda _: object())
    assert [facts_at_hand(name) for name in ("auto", "cpu", "cuda")] == [T4, CPU, T4]


def test_plans_count_on_what_training_takes() -> None:
    assert job(1).is_fused(1)
    assert job(1).has_fused_kernels(1)
    assert job(1, "compile.enabled=true").is_fused(1)
    assert not job(1, "compile.enabled=true").has_fused_kernels(1)
    assert not job(1, "kernels=torch").is_fused(1)
    assert not job(1, "run.device=cpu").is_fused(1)
    assert not job(1, gpu="cpu").is_fused(1)
    fp8 = job(2, "precision.fp8=current")
    assert fp8.has_fused_kernels(1)
    assert not fp8.has_fused_kernels(2)


def _train_without_triton() -> bool:
    # Importing it is an error from here on; PyTorch may have done so before.
    sys.modules["triton"] = None  # type: ignore[assignment]
    config = small_config(kernels="auto", precision={"compute": "bf16"})
    model = small_model(config, cpu_topology())
    build_optimizer(config, model)
    model.runner.train([packed_inputs(2)], torch.ones(()))
    return "megatron_bert.model.fused_block" in sys.modules


def test_on_a_cpu_auto_does_not_import_triton() -> None:
    assert run_ranks(1, _train_without_triton) == [False]
