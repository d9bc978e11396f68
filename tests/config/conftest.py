"""A small valid configuration that each test bends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bert.config.checks import check_config
from megatron_bert.config.load import load_config
from megatron_bert.config.schema import Config
from megatron_bert.errors import ConfigError

SMALL: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "max_position_embeddings": 128,
    },
    "data": {
        "tokenizer": "tokenizer.model",
        "train": [{"prefix": "first"}, {"prefix": "second", "weight": 2.0}],
    },
    "curriculum": [
        {"seq_length": 32, "steps": 100},
        {"seq_length": 64, "steps": 200},
        {"seq_length": 128, "steps": 50},
    ],
    "batch": {"global_size": 8},
}

Build = Callable[..., Config]


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """The small configuration as a file."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def build(small_file: Path) -> Build:
    """Load the small configuration with the given overrides."""
    return lambda *overrides: load_config(small_file, overrides)


def refusal(build: Build, *overrides: str, world_size: int = 1) -> str:
    """Return the message that the small configuration with these overrides is refused with."""
    with pytest.raises(ConfigError) as caught:
        check_config(build(*overrides), world_size=world_size)
    return str(caught.value)
