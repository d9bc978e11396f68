"""The tool on a model that this project trained and exported, and with an older transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.config.schema import Config
from megatron_bert.jglue.tasks import TASKS
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks
from tests.huggingface.releases import older_release, packages_folder
from tests.jglue.conftest import write_task
from tests.training.runs import run_config, train

CHECKOUT = Path(__file__).resolve().parents[2]


def _train(config: Config) -> None:
    train(config, stop_after=2)


def _run(model: Path, task: str, folder: Path, **environment: str) -> dict[str, float]:
    """Run the tool as a user does; it must have nothing to say on standard error."""
    data = write_task(task, folder / task)
    command = [sys.executable, CHECKOUT / "tools" / "finetune_jglue.py", "--task", task]
    command += ["--model", model, "--data", data, "--output", folder / "output"]
    command += ["--max-length", "32", "--epochs", "1"]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    (cell,) = json.loads((folder / "output" / "results.json").read_text())["tasks"][task]["cells"]
    return {**cell["scores"], **cell["versions"]}


@pytest.fixture(scope="module")
def exported(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after two steps of pretraining."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = run_config(tiny_data, folder / "run")
    run_ranks(1, _train, config)
    checkpoint = config.run.directory / "checkpoints" / "step_00000002"
    export_checkpoint(checkpoint, folder / "exported")
    return folder / "exported"


# All five are tuned in this process by test_finetune_jglue.py; these two have heads of their own.
@pytest.mark.slow
@pytest.mark.parametrize("task", ["jsquad", "jcommonsenseqa"])
def test_an_exported_checkpoint_is_fine_tuned(exported: Path, tmp_path: Path, task: str) -> None:
    assert set(TASKS[task].metrics) <= set(_run(exported, task, tmp_path))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "task"), [*(("exported", task) for task in TASKS), ("bert", "jsquad")]
)
def test_the_older_transformers_serves_as_well(
    models: dict[str, Path], tmp_path: Path, name: str, task: str
) -> None:
    release = older_release()
    packages = packages_folder(release)
    assert _run(models[name], task, tmp_path, PYTHONPATH=str(packages))["transformers"] == release
