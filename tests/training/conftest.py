"""Runs on the tiny corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.schema import Config
from tests.training.runs import run_config


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> Callable[..., Config]:
    """Configuration of a run on the tiny corpus, named and changed by the arguments."""

    def configure(name: str = "run", **changes: Any) -> Config:
        return run_config(tiny_data, tmp_path / name, **changes)

    return configure
