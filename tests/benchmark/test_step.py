from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, record_function

from megatron_bert.benchmark.gemm import model_gemms
from megatron_bert.benchmark.machine import Hardware
from megatron_bert.benchmark.rows import keys_per_query
from megatron_bert.benchmark.step.figures import StepCase, StepFigures
from megatron_bert.benchmark.step.kernel_shares import Span, kind_of, profiled_spans, sum_spans
from megatron_bert.benchmark.step.table import step_table
from megatron_bert.config.flops import head_flops, peak_tflops, row_flops
from megatron_bert.config.schema import ModelConfig
from megatron_bert.data.batch import Batch, RowArrays
from tests.benchmark.test_benchmark_tool import run_tool

MODEL = """
model:
  num_layers: 2
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 2
  num_query_groups: 1
  max_position_embeddings: 64
data: {tokenizer: none, train: [{prefix: none}]}
curriculum: [{seq_length: 64, steps: 1}]
batch: {global_size: 4, micro_tokens: 128}
precision: {compute: fp32}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MODEL)
    return path


def test_steps_are_measured_as_the_interface_says(config: Path, tmp_path: Path) -> None:
    # Made-up ids lie below it, so a small model is measured with a vocabulary of its own size.
    keys = ("model.vocab_size=512",)
    arguments = (*keys, "--config", config, "--quick", "--json", "--lengths", 32, 64)
    done = run_tool("step", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["matmul_tflops"] > 0
    assert not document["failed"]
    assert [case["seq_length"] for case in document["cases"]] == [32, 64]
    for case in document["cases"]:
        assert case["rows"] == 128 // case["seq_length"]
        assert case["profiled_seconds"] is None
        rate = 128 / case["step_seconds"]
        assert case["tokens_per_second"] == pytest.approx(rate, rel=0.01, abs=1)
        for part in ("gemm", "attention", "softmax"):
            assert case[f"{part}_seconds"] > 0
        assert case["mfu"] is None or 0 < case["mfu"] < 1


def test_a_dataset_that_is_not_there_is_named(config: Path, tmp_path: Path) -> None:
    done = run_tool("step", "--config", config, "--data", "nowhere/x", folder=tmp_path)
    assert done.returncode == 2
    assert "nowhere/x.bin" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--lengths", 0), "--lengths: 0: give a whole number above 0"),
        (("--lengths", 65), "model.max_position_embeddings=64"),
        (("--dropout", 1), "--dropout: 1: give a number from 0 to below 1"),
        (("--steps", -1), "--steps: -1: give a whole number above 0"),
        (("model.vocab_size=12",), "model.vocab_size = 12: made-up rows need 16 ids"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    config: Path, tmp_path: Path, arguments: tuple[object, ...], named: str
) -> None:
    done = run_tool("step", "--config", config, "--quick", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_slot_sees_its_own_segment() -> None:
    arrays = RowArrays.empty(2, 8, 1)
    arrays.positions_BS[:] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert keys_per_query([Batch.of(arrays, 0)]) == (16 + 9 + 1 + 64) / 16


def test_operations_are_those_of_the_products_and_of_the_segments() -> None:
    model = ModelConfig(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=1,
        max_position_embeddings=64,
    )
    products = sum(
        gemm.count * 3 * 2 * gemm.tokens * gemm.inputs * gemm.outputs
        for gemm in model_gemms(model, 512, 64, 10)
    )
    attention = 3 * 3 * 2 * 64 * 2 * 20 * 64
    assert row_flops(model, 512, 64, 10, keys_per_query=20) == products + attention
    assert row_flops(model, 512, 64, 10) == row_flops(model, 512, 64, 10, keys_per_query=64)
    assert head_flops(model, 512, 10) == 3 * 2 * 10 * 64 * (64 + 512)


def test_the_peak_goes_by_the_gpus_name() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA GH200 480GB") == 989.0
    assert peak_tflops("NVIDIA H200 NVL") == 835.0
    assert peak_tflops("a toaster") is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN", "GEMM"),
        ("flash_key_gradient_kernel", "attention"),
        ("triton_poi_fused_cat_mul_silu_silu_backward_4", "norm and elementwise"),
        ("softmax_gradient_kernel", "norm and elementwise"),
        ("column_sums_kernel", "norm and elementwise"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "data"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_shares_are_of_the_time_that_kernels_span_those_of_several_streams_once() -> None:
    second = 10**9
    spans = [
        Span("nvjet_a", 4 * second, 6 * second),
        Span("nvjet_b", 10 * second, 11 * second),
        Span("ncclDevKernel", 5 * second, 7 * second),
        Span("nvjet_a", 13 * second, 14 * second),
    ]
    found = sum_spans(spans)
    assert found is not None
    assert found.seconds == 10.0
    assert found.kinds == {"idle": 0.5, "GEMM": 0.4, "communication": 0.2}
    assert found.kernels == {"nvjet_a": 0.3, "ncclDevKernel": 0.2, "nvjet_b": 0.1}
    assert sum_spans([]) is None


def test_the_step_in_which_the_profiler_starts_is_not_counted() -> None:
    steps: list[int] = []

    def step() -> None:
        steps.append(len(steps) + 1)
        with record_function(f"step {len(steps)}"):
            torch.ones(3).cumsum(0)

    spans = profiled_spans(step, ProfilerActivity.CPU, lambda: None)
    names = [span.name for span in spans]
    assert steps == [1, 2]
    assert names.count("step 2") == names.count("aten::cumsum") == 1
    assert "step 1" not in names
    assert not [name for name in names if name.startswith("ProfilerStep")]
    assert all(span.begin <= span.end for span in spans)


def test_the_table_tells_the_time_that_shares_are_of() -> None:
    case = StepCase(
        seq_length=512, dropout=0.1, rows=64, micro_batches=2, keys_per_query=200.0,
        tokens_per_second=55_910, tflops_per_gpu=420.0, mfu=0.42, peak_memory_gb=71.1,
        step_seconds=1.2, gemm_seconds=None, attention_seconds=None, softmax_seconds=None,
        first_step_seconds=10.0, loss=9.0, profiled_seconds=1.1719, shares={"GEMM": 0.6},
    )  # fmt: skip
    hardware = Hardware("a processor", 16, 128.0, 0.5)
    figures = StepFigures(hardware, "a GPU", 1, {}, False, 800.0, [case], {})
    assert step_table(figures)[-1].split(maxsplit=2) == ["time", "in", "GEMM 60.0% of 1.172 s"]
    unprofiled = StepFigures(
        hardware, "cpu", 1, {}, False, 1.0, [replace(case, profiled_seconds=None)], {}
    )
    assert not any("time in" in line for line in step_table(unprofiled))
