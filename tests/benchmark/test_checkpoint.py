from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from megatron_bert.benchmark.checkpoint.measure import (
    FULL,
    CheckpointFigures,
    SaveFigures,
    StateFigures,
)
from megatron_bert.benchmark.checkpoint.table import checkpoint_table
from megatron_bert.benchmark.machine import describe_hardware
from megatron_bert.config.parameters import parameter_count
from tests.benchmark.test_benchmark_tool import RATE, TEXT, fields
from tests.deadlines import DEADLINE_SECONDS
from tools import benchmark as tool

SAVE = fields(
    save_seconds=RATE,
    median_save_seconds=RATE,
    blocked_seconds=RATE,
    median_blocked_seconds=RATE,
    first_blocked_seconds=RATE,
)
SCHEMA = fields(
    hardware=fields(processor=TEXT, cores=RATE, memory_gb=RATE),
    versions=fields(python=TEXT, torch=TEXT),
    quick={"const": True},
    save_seconds=RATE,
    blocked_seconds=RATE,
    load_seconds=RATE,
    bytes=RATE,
    files=RATE,
    parameters=RATE,
    synchronous=SAVE,
    asynchronous=SAVE,
)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tool.__file__, "checkpoint", "--quick", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, **options
    )


def test_standard_output_is_one_json_document_with_every_figure(tmp_path: Path) -> None:
    done = run("--json", cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, SCHEMA)
    # Weights and two moments in fp32, and headers.
    assert 0 < document["bytes"] - 12 * document["parameters"] < 100_000
    assert document["save_seconds"] == document["synchronous"]["save_seconds"]
    assert document["blocked_seconds"] == document["asynchronous"]["blocked_seconds"]
    assert list(tmp_path.glob("megatron_bert_*")) == [], "torch may leave a folder of its own"


def test_the_table_shows_both_ways_of_saving() -> None:
    ways = [SaveFigures(4.0, 5.0, 4.0, 5.0, 6.0), SaveFigures(3.0, 3.5, 0.25, 0.5, 1.25)]
    state = StateFigures(300_000_000, 3_600_000_000, 4, *ways, 2.0, 2.5)
    figures = CheckpointFigures(describe_hardware(), {"torch": "2"}, False, state)
    lines = checkpoint_table(figures)
    assert lines[0].startswith("machine")
    assert lines[2].endswith("300.0 M parameters and their moments: 3.60 GB in 4 files")
    assert "3.00 s (median 3.50 s), training stands still for 0.25 s" in lines[4]


def test_the_model_has_about_300_million_parameters() -> None:
    assert parameter_count(FULL.config().model, FULL.vocab_size) == pytest.approx(3e8, rel=0.02)


@pytest.mark.faults
def test_a_full_disk_ends_the_tool_with_two_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    done = run(
        env={"TMPDIR": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write checkpoints")
    assert "TMPDIR" in done.stderr
    assert list(tmp_path.glob("megatron_bert_*")) == [], "torch may leave a folder of its own"
