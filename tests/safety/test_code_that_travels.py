"""An export carries the project's own code and no other; code found in one is not executed here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.config.schema import Config
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks
from tests.training.runs import run_config, train

CHECKOUT = Path(__file__).resolve().parents[2]
OWN_CODE = {"configuration_retrieva_bert.py", "modeling_retrieva_bert.py"}


def _train(config: Config) -> None:
    train(config, stop_after=2)


def _code(trace: Path) -> str:
    return f"import os\nos.makedirs({str(trace)!r}, exist_ok=True)\n"


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in whose folder, and beside it, lies code."""
    config = run_config(tiny_data, tmp_path_factory.mktemp("run") / "run")
    run_ranks(1, _train, config)
    folder = config.run.directory / "checkpoints" / "step_00000002"
    for name in (*OWN_CODE, "setup.py", "__init__.py", "conftest.py"):
        for place in (folder, config.run.directory):
            (place / name).write_text(_code(config.run.directory / "executed"))
    return folder


def test_an_export_has_exactly_the_projects_own_code(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    export_checkpoint(checkpoint, output)
    assert {path.name for path in output.iterdir()} == {
        *OWN_CODE,
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in OWN_CODE:
        own = CHECKOUT / "megatron_bert" / "huggingface" / name
        assert (output / name).read_bytes() == own.read_bytes()
    assert not (checkpoint.parents[1] / "executed").exists()


def test_code_in_an_exported_directory_is_not_executed_by_the_projects_programs(
    checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    output, trace = tmp_path / "exported", tmp_path / "executed"
    export_checkpoint(checkpoint, output)
    for name in (*OWN_CODE, "__init__.py", "tokenization_retrieva_bert.py"):
        (output / name).write_text(_code(trace))
    texts = tmp_path / "texts.txt"
    texts.write_text("The quick brown fox jumps over a lazy dog.\n" * 3)
    arguments = ["--model", output, "--input", texts, "--count", "2"]
    asked = subprocess.run(
        [sys.executable, CHECKOUT / "examples" / "fill_masks.py", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=tmp_path,
    )
    assert asked.returncode == 0, asked.stderr
    assert "the right word was among the first" in asked.stdout
    assert asked.stderr == ""
    assert not trace.exists()
