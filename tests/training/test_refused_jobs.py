"""A refused job replaces what the one before it left for scripts to read, but for FINISHED."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_bert.command_line.run import run_cli
from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from megatron_bert.errors import DataError, UserError
from megatron_bert.training.main import main
from megatron_bert.training.stops import STOP_SIGNALS
from megatron_bert.training.trainer import Trainer
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks
from tests.training.runs import run_config, train

CHECKOUT = Path(__file__).resolve().parents[2]


def test_a_configuration_no_layout_can_hold_leaves_failed_where_stopped_was(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOPPED").write_text("{}")
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(tiny_run()))
    command = [sys.executable, str(CHECKOUT / "pretrain_bert.py"), "parallel.tensor=3"]
    refused = subprocess.run(
        [*command, "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.startswith("error: ")
    assert not (run / "STOPPED").exists()
    assert "parallel.tensor" in json.loads((run / "FAILED").read_text())["reason"]
    assert not (run / "config.yaml").exists()


def test_a_first_command_that_is_refused_leaves_no_run_directory(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_run(valid=False)))
    command = ["--config", str(tmp_path / "tiny.yaml"), "data.train.0.prefix=missing"]
    with pytest.raises(DataError):
        _main(*command)
    assert not (tmp_path / "run").exists()
    # What somebody else has put there is not this command's to remove.
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError):
        _main(*command)
    assert list(_told(tmp_path / "run")) == ["FAILED"]


def _told(run: Path) -> dict[str, str]:
    """What tells how the last job ended, by file."""
    names = ("FINISHED", "STOPPED", "FAILED")
    return {name: (run / name).read_text() for name in names if (run / name).exists()}


# The lock of a run directory ends with the process, and here that goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_finished_run_stays_so_when_a_command_is_refused_and_until_a_job_of_it_trains(
    tiny_run: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--config", str(tmp_path / "tiny.yaml")]
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_run(valid=False)))
    _main(*command)
    finished = _told(tmp_path / "run")
    assert list(finished) == ["FINISHED"]
    refused = ("optimizer.lr=1e-3", "data.train.0.prefix=missing", "checkpoint.resume=none")
    for key in (*refused, "parallel.tensor=2", "parallel.tensor=3"):
        with pytest.raises(UserError):
            _main(*command, key)
        assert _told(tmp_path / "run") == finished

    def fail(self: Trainer, *_: object) -> None:
        assert self.step == 12
        assert not _told(tmp_path / "run")
        raise DataError("rows are bad")

    monkeypatch.setattr(Trainer, "run", fail)
    with pytest.raises(DataError, match="rows are bad"):
        _main(*command, "curriculum.1.steps=6")
    assert list(_told(tmp_path / "run")) == ["FAILED"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["training", "dry-run"])
@pytest.mark.parametrize(
    ("override", "package"),
    [("log.wandb.mode=offline", "wandb"), ("log.tensorboard=true", "tensorboard")],
)
def test_a_logger_that_is_not_installed_is_refused_before_training(
    tiny_run: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    package: str,
    options: list[str],
) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_run(valid=False)))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as refused:
        run_cli(lambda: _main("--config", str(tmp_path / "tiny.yaml"), override, *options))
    assert refused.value.code == 2
    key, value = override.split("=")
    wanted = f"{key} = {value}: the package {package} is not installed; pip install {package}, or"
    assert f"error: {wanted}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def _main(*arguments: str) -> None:
    """Run the command line in this process, which is left as it was."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        assert main(arguments) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_overrides_may_stand_on_both_sides_of_the_options(
    tiny_run: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(tiny_run()))
    options = ["--config", str(config), "--print-config"]
    assert main(["run.seed=5", *options, "eval.interval=6"]) == 0
    printed = capsys.readouterr().out
    assert "seed: 5" in printed
    assert "interval: 6" in printed


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_dataset_that_was_truncated_before_the_start_is_refused_by_name(
    tiny_data: Path, tmp_path: Path, suffix: str, kept: float
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    file = data / f"train{suffix}"
    os.truncate(file, int(file.stat().st_size * kept))
    config = run_config(data, tmp_path / "run")
    for refused in run_ranks(2, _refused, config):
        assert f"dataset {data / 'train'} cannot be used: {data / 'train.idx'}: " in refused
        assert "tools/preprocess_data.py" in refused
    assert not (tmp_path / "run" / "checkpoints").exists()


def _refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)
