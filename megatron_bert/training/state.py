"""What a checkpoint holds, and how a run restores it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.checkpoint.manifest import JSON
from megatron_bert.checkpoint.run_state import MODEL_PREFIX, OPTIMIZER_PREFIX, RunState
from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.model.build import RankModel
from megatron_bert.optim.sharded import ShardedOptimizer
from megatron_bert.parallel.sharding import local_part


def state_tensors(model: RankModel, optimizer: ShardedOptimizer) -> dict[str, Tensor]:
    """All tensors of a training state under one flat namespace, as this rank holds them.

    Weights are `model.NAME`, moments `optim.NAME.exp_avg` and `optim.NAME.exp_avg_sq` (AdamW's) or
    `optim.NAME.momentum` (Muon's), with fully-qualified parameter names: no layout leaves a trace
    in the keys.
    """
    tensors = {f"{MODEL_PREFIX}{name}": p.detach() for name, p in model.named_parameters().items()}
    rounded = [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]
    assert not rounded, f"weights are gathered in the compute type, not shards: {rounded[:3]}"
    moments = optimizer.state_tensors()
    return tensors | {f"{OPTIMIZER_PREFIX}{name}": moment for name, moment in moments.items()}


def local_bytes(model: RankModel, optimizer: ShardedOptimizer) -> int:
    """Bytes of what this rank holds of the state."""
    return sum(local_part(tensor).nbytes for tensor in state_tensors(model, optimizer).values())


def save_state(
    saver: CheckpointSaver,
    step: int,
    model: RankModel,
    optimizer: ShardedOptimizer,
    state: Mapping[str, JSON],
    *,
    is_last: bool,
) -> None:
    """Save a checkpoint of `step`, whose manifest says `state` (`run_state.trained_state`).

    Model and optimizer may be changed as soon as this returns. The last save of a job is waited
    for and must succeed (see `CheckpointSaver.save`, also for the errors raised).
    """
    saver.save(step, state_tensors(model, optimizer), state, is_last=is_last)


def load_state(
    store: CheckpointStore, path: Path, model: RankModel, optimizer: ShardedOptimizer
) -> None:
    """Load a checkpoint into model and optimizer in place.

    A checkpoint converted from a Hugging Face directory has no moments, and those of another
    optimizer are of no use: the optimizer then keeps its own (zero if it is new), and no update is
    counted.
    """
    state = RunState(path, store.read_state(path))
    tensors = state_tensors(model, optimizer)
    begins_anew = state.is_imported or state.optimizer != optimizer.name
    if begins_anew:
        tensors = {name: t for name, t in tensors.items() if name.startswith(MODEL_PREFIX)}
    store.load(path, tensors, left_out=OPTIMIZER_PREFIX if begins_anew else None)
    optimizer.updates = 0 if begins_anew else state.optimizer_updates
