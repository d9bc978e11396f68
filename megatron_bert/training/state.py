"""What a checkpoint holds, and how a run takes it up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bert.checkpoint.run_state import MODEL_PREFIX, RunState
from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.model.build import RankModel
from megatron_bert.optim.adamw import ShardedAdamW
from megatron_bert.parallel.sharding import local_part


def state_tensors(model: RankModel, optimizer: ShardedAdamW) -> dict[str, Tensor]:
    """All tensors of a training state under one flat namespace, as this rank holds them.

    Weights are `model.NAME`, moments `optim.NAME.exp_avg` and `optim.NAME.exp_avg_sq`, with
    fully-qualified parameter names: no layout leaves a trace in the keys.
    """
    tensors = {f"{MODEL_PREFIX}{name}": p.detach() for name, p in model.named_parameters().items()}
    rounded = [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]
    assert not rounded, f"weights are gathered in the compute type, not shards: {rounded[:3]}"
    moments = optimizer.state_tensors()
    return tensors | {f"optim.{name}": moment for name, moment in moments.items()}


def local_bytes(model: RankModel, optimizer: ShardedAdamW) -> int:
    """Bytes of what this rank holds of the state."""
    return sum(local_part(tensor).nbytes for tensor in state_tensors(model, optimizer).values())


def save_state(
    saver: CheckpointSaver,
    step: int,
    model: RankModel,
    optimizer: ShardedAdamW,
    facts: dict[str, Any],
    *,
    is_last: bool,
) -> None:
    """Save a checkpoint; `facts` join the manifest's state (step, rows, config, ...).

    Model and optimizer may be changed as soon as this returns. The last save of a job is waited
    for and must succeed (see `CheckpointSaver.save`, also for the errors raised).
    """
    facts = {**facts, "step": step, "optimizer_updates": optimizer.updates}
    saver.save(step, state_tensors(model, optimizer), facts, is_last=is_last)


def load_state(
    store: CheckpointStore, path: Path, model: RankModel, optimizer: ShardedAdamW
) -> None:
    """Load a checkpoint into model and optimizer in place.

    One that was converted from a Hugging Face directory has no moments: those stay as they are, of
    a new optimizer zero.
    """
    state = RunState(path, store.read_state(path))
    tensors = state_tensors(model, optimizer)
    if state.is_imported:
        tensors = {name: t for name, t in tensors.items() if name.startswith(MODEL_PREFIX)}
    store.load(path, tensors)
    optimizer.updates = state.optimizer_updates
