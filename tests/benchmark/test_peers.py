"""Trainers beside each other: the same model, the same documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.benchmark.peers import measure
from megatron_bert.benchmark.peers.measure import _in_keys
from megatron_bert.benchmark.peers.step_rows import StepRows
from megatron_bert.config.kernels import ComputeDevice
from megatron_bert.config.schema import Config
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import build_model
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
VOCABULARY = 99_584
TREE: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
    },
    "data": {"tokenizer": "none", "train": [{"prefix": "none"}]},
    "curriculum": [{"seq_length": 64, "steps": 10}],
    "batch": {"global_size": 4},
    "precision": {"compute": "fp32"},
}


def _run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(TREE))
    command = [sys.executable, str(TOOL), "peers", "--config", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)


def _parameters_of_each() -> dict[str, int]:
    from megatron_bert.benchmark.peers.megatron import megatron_model
    from megatron_bert.benchmark.peers.trainer import trainer_model

    config = Config.model_validate(TREE)
    topology = Topology.of(config.parallel, torch.device("cpu"), 60.0)
    ours = build_model(config, VOCABULARY, topology)
    models = {
        "ours": list(ours.named_parameters().values()),
        "Trainer": list(trainer_model(config, VOCABULARY).parameters()),
        "Megatron-core": list(megatron_model(config, VOCABULARY).parameters()),
    }
    return {name: sum(p.numel() for p in parameters) for name, parameters in models.items()}


@pytest.mark.peers
def test_all_train_a_model_of_as_many_parameters() -> None:
    (counts,) = run_ranks(1, _parameters_of_each)
    assert len(set(counts.values())) == 1, counts


@pytest.mark.peers
def test_every_trainer_is_timed_on_the_same_documents(tmp_path: Path) -> None:
    options = (
        "--quick",
        "--json",
        "--lengths",
        "32",
        "--micro-tokens",
        "64",
        "--micro-batches",
        "2",
    )
    done = _run(tmp_path, "precision.compute=bf16", *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert not figures["failed"]
    cases = {case["trainer"]: case for case in figures["cases"]}
    assert list(cases) == ["megatron_bert", "Trainer", "Megatron-core"]
    assert cases["Trainer"]["text_share"] == cases["Megatron-core"]["text_share"] < 30 / 32 + 1e-9
    ours = cases["megatron_bert"]["text_tokens_per_second"]
    for case in cases.values():
        assert (case["rows"], case["micro_batches"]) == (4, 2)
        rate = case["text_share"] * 128 / case["step_seconds"]
        assert case["text_tokens_per_second"] == pytest.approx(rate, rel=0.01, abs=0.5)
        expected = ours / case["text_tokens_per_second"]
        assert case["ratio"] == pytest.approx(expected, abs=0.01)
    assert "precision.compute=bf16 " in figures["ours"]
    assert figures["trainers"].keys() == cases.keys()
    assert {"transformers", "accelerate", "megatron-core"} <= figures["versions"].keys()


def test_who_lacks_memory_computes_the_same_rows_in_smaller_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[StepRows] = []
    assert StepRows.of(32_768, 384, 1) == StepRows(80, 1)
    assert StepRows.of(384 * 6, 384, 2) == StepRows(4, 2)
    assert StepRows.of(100, 384, 2) == StepRows(1, 2)

    def take_two_rows(_w: Any, _l: int, step: StepRows, _d: Any) -> tuple[float, float]:
        asked.append(step)
        if step.micro_rows > 2:
            raise torch.OutOfMemoryError("4 GiB")
        return 200.0, 2.0

    monkeypatch.setitem(measure._MEASURES, "megatron_bert", take_two_rows)
    work: Any = None
    case = measure._first_that_fits(work, "megatron_bert", 64, StepRows(8, 3), torch.device("cpu"))
    assert asked == [StepRows(8, 3), StepRows(4, 6), StepRows(2, 12)]
    assert case is not None
    assert (case.rows, case.micro_batches) == (24, 12)


def test_a_comparison_takes_one_dropout(tmp_path: Path) -> None:
    done = _run(tmp_path, "--dropout", "0", "0.1")
    assert done.returncode == 2
    assert "error: --dropout 0.0 0.1: trainers are compared at one value; give one" in done.stderr


@pytest.mark.parametrize(
    ("key", "kind", "said"),
    [("auto", "cuda", "true"), ("auto", "cpu", "false"), (False, "cuda", "false")],
)
def test_a_comparison_tells_whether_our_passes_are_recorded(
    key: str | bool, kind: str, said: str
) -> None:
    config = Config.model_validate(TREE).with_keys({"compile.cuda_graphs": key})
    assert f" compile.cuda_graphs={said} " in _in_keys(config, ComputeDevice(kind))
