"""A run whose metrics are copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from tests.run.mirrors.support import line_of


@pytest.fixture
def run_dir(tiny_run: Callable[..., Config]) -> Path:
    """A run's directory with three steps' metrics and wandb switched on."""
    config = tiny_run(log={"wandb": {"mode": "offline"}})
    directory = config.run.directory
    (directory / "logs").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    (directory / "metrics.jsonl").write_text(
        line_of(1, stage=0, seq_length=32, tokens=64, loss=1.0)
        + line_of(2, stage=1, seq_length=64, tokens=128, loss=0.5)
        + line_of(2, stage=1, tokens=128, valid_loss=0.5)
    )
    return directory
