"""What the manifest of a training checkpoint says of its run, for those who are not that run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_bert.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_bert.config.errors import CheckpointError
from megatron_bert.config.schema import ModelConfig

MODEL_PREFIX = "model."
"""What the names of weights begin with among a checkpoint's tensors."""


class RunState:
    """The state in a manifest, read field by field.

    Every property raises `CheckpointError`, naming file and field, where that is missing.

    Args:
        folder: The checkpoint's folder.
        manifest: Its manifest.

    Attributes:
        folder: The checkpoint's folder.
        step: Optimizer steps taken.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.step = manifest.step
        self._state: Mapping[str, Any] = manifest.state

    @property
    def consumed_rows(self) -> int:
        """Rows that the steps took."""
        return int(self._field("consumed_rows"))

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration as plain values; an import's has but what concerns the model."""
        config: Mapping[str, Any] = self._field("config")
        return config

    @property
    def is_imported(self) -> bool:
        """Whether it holds weights alone, which came from elsewhere: no run has saved it."""
        return bool(self._state.get("weights_only", False))

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""
        try:
            return ModelConfig.model_validate(self._field("config", "model"))
        except ValidationError as error:
            raise CheckpointError(
                f"{self.folder / MANIFEST_NAME}: state.config.model cannot be read ({error}); use "
                "the version of this program that wrote it"
            ) from error

    @property
    def tokenizer(self) -> Path:
        """Where the run found its tokenizer."""
        return Path(str(self._field("config", "data", "tokenizer")))

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return str(self._field("tokenizer_hash"))

    @property
    def data(self) -> list[str]:
        """A line on every training corpus."""
        return [str(line) for line in self._field("data")]

    @property
    def topology(self) -> Mapping[str, Any]:
        """Numbers of ranks of the job that saved it, and under `keys` its `parallel` section."""
        topology: Mapping[str, Any] = self._field("topology")
        return topology

    def _field(self, *names: str) -> Any:
        value: Any = self._state
        for name in names:
            if not isinstance(value, Mapping) or name not in value:
                raise CheckpointError(
                    f"{self.folder / MANIFEST_NAME}: has no state.{'.'.join(names)}; name a "
                    "checkpoint of a training run"
                )
            value = value[name]
        return value
