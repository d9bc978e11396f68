"""What the manifest of a training checkpoint says of its run: writing and reading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_bert.checkpoint.manifest import JSON, MANIFEST_NAME
from megatron_bert.config.schema import ModelConfig
from megatron_bert.errors import CheckpointError

MODEL_PREFIX = "model."
"""The prefix of the names of weights among a checkpoint's tensors."""
OPTIMIZER_PREFIX = "optim."
"""The prefix of the names of the optimizer's states."""


def trained_state(
    *,
    step: int,
    consumed_rows: int,
    optimizer: str,
    optimizer_updates: int,
    config: Mapping[str, Any],
    tokenizer_hash: str,
    data: list[str],
    topology: Mapping[str, Any],
) -> dict[str, JSON]:
    """The state in the manifest of a run's checkpoint; for its fields see `RunState`."""
    return {
        "step": step,
        "consumed_rows": consumed_rows,
        "optimizer": optimizer,
        "optimizer_updates": optimizer_updates,
        "config": config,
        "tokenizer_hash": tokenizer_hash,
        "data": [*data],
        "topology": topology,
    }


def imported_state(model: ModelConfig, tokenizer: Path, tokenizer_hash: str) -> dict[str, JSON]:
    """The state for imported weights: only what a run compares with its own.

    Args:
        model: the shape of the weights.
        tokenizer: the tokenizer's file that the run to come must use.
        tokenizer_hash: its SHA-256.
    """
    return {
        "step": 0,
        "consumed_rows": 0,
        "optimizer_updates": 0,
        "weights_only": True,
        "tokenizer_hash": tokenizer_hash,
        "data": [],
        "config": {
            "model": model.model_dump(mode="json"),
            "data": {"tokenizer": str(tokenizer.absolute())},
            # No steps were taken, of any size.
            "curriculum": [],
            "batch": {"global_size": None},
        },
    }


class RunState:
    """The state in a manifest, read field by field.

    The manifest's checksum proves that it is undamaged, not that a training run wrote it: every
    property raises `CheckpointError`, naming file and field, if the field is missing or of another
    kind.

    Args:
        folder: The checkpoint's folder.
        state: The `state` of its manifest.

    Attributes:
        folder: The checkpoint's folder.
    """

    def __init__(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.folder = folder
        self._state = state

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Blame the manifest for errors in the block, which reads the values of a field.

        Raises:
            CheckpointError: The field lacks a value, or has one of another kind.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder / MANIFEST_NAME}: its state is not that of a training run "
                f"({type(error).__name__}: {error}); use a checkpoint that this program wrote"
            ) from error

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self._field("step", kind=int))

    @property
    def consumed_rows(self) -> int:
        """Rows that these steps read."""
        return int(self._field("consumed_rows", kind=int))

    @property
    def optimizer(self) -> str:
        """Whose moments it holds, by `optimizer.name`; AdamW if absent, once the only one."""
        return str(self._state.get("optimizer", "adamw"))

    @property
    def optimizer_updates(self) -> int:
        """Steps that changed the weights: those that were not skipped."""
        return int(self._field("optimizer_updates", kind=int))

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration as plain values; an import's has only what concerns the model."""
        config: Mapping[str, Any] = self._field("config", kind=Mapping)
        return config

    @property
    def is_imported(self) -> bool:
        """Whether it holds only imported weights, and was not saved by a run."""
        return bool(self._state.get("weights_only", False))

    @property
    def origin(self) -> str | None:
        """Name of the checkpoint that `checkpoint.resume` named; None if it named none."""
        with self.reading():
            resume = self.config.get("checkpoint", {}).get("resume", "auto")
        return None if resume in ("auto", "none") else Path(str(resume)).name

    @property
    def longest_row(self) -> int | None:
        """Slots of the longest rows of the steps taken, as far as the curriculum tells."""
        stages = self._field("config", "curriculum", kind=list)
        with self.reading():
            lengths, before = [], 0
            for stage in stages:
                if before < self.step:
                    lengths.append(int(stage["seq_length"]))
                before += int(stage["steps"])
        return max(lengths, default=None)

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""
        try:
            return ModelConfig.model_validate(self._field("config", "model", kind=Mapping))
        except ValidationError as error:
            raise CheckpointError(
                f"{self.folder / MANIFEST_NAME}: state.config.model cannot be read ({error}); use "
                "the version of this program that wrote it"
            ) from error

    @property
    def tokenizer(self) -> Path:
        """Where the run found its tokenizer."""
        return Path(self._field("config", "data", "tokenizer", kind=str))

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return str(self._field("tokenizer_hash", kind=str))

    @property
    def data(self) -> list[str]:
        """One line per training corpus."""
        return [str(line) for line in self._field("data", kind=list)]

    @property
    def topology(self) -> Mapping[str, Any]:
        """Numbers of ranks of the job that saved it, and under `keys` its `parallel` section."""
        topology: Mapping[str, Any] = self._field("topology", kind=Mapping)
        return topology

    def _field(self, *names: str, kind: type) -> Any:
        value: Any = self._state
        for name in names:
            if not isinstance(value, Mapping) or name not in value:
                raise CheckpointError(
                    f"{self.folder / MANIFEST_NAME}: has no state.{'.'.join(names)}; name a "
                    "checkpoint of a training run"
                )
            value = value[name]
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self.folder / MANIFEST_NAME}: state.{'.'.join(names)} is {value!r}, not what a "
                "training run writes there; use a checkpoint that this program wrote"
            )
        return value
