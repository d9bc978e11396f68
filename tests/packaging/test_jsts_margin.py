"""The example that shows what pretraining is worth: what it takes, before anything is installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_bert.config.checks import check_config
from megatron_bert.config.load import load_config
from tests.deadlines import DEADLINE_SECONDS

CHECKOUT = Path(__file__).resolve().parents[2]


def _margin(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", CHECKOUT / "examples" / "jsts_margin.sh", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )


def test_it_explains_itself(tmp_path: Path) -> None:
    result = _margin("--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: bash examples/jsts_margin.sh TRAIN_TEXT VALID_TEXT JSTS_FOLDER" in result.stdout
    too_few = _margin("a.jsonl", cwd=tmp_path)
    assert too_few.returncode == 2
    assert "usage:" in too_few.stderr


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    result = _margin("train.jsonl", "nowhere.jsonl", ".", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere.jsonl: no such file or folder")
    assert not result.stdout


@pytest.mark.parametrize("name", ["aozora_small_cpu.yaml", "aozora_small_gpu.yaml"])
def test_its_configurations_can_be_trained_once_the_script_has_set_their_data(name: str) -> None:
    path = CHECKOUT / "examples" / name
    config = load_config(path, ["data.tokenizer=t.model", "data.train.0.prefix=x"])
    check_config(config, world_size=1, vocab_size=8192)
