"""Three training steps under any layout, and what they leave behind, whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.checks import check_config
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config
from megatron_bert.data.source import training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import RankModel, build_model
from megatron_bert.optim.sharded import ShardedOptimizer, Update
from megatron_bert.training.batches import GlobalBatch, ReadAhead
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.staging import HostMemory
from megatron_bert.training.step import agree, take_step

STEPS = 3
# Divides over 2, 3 and 4 ranks, and the tokenizer's 512 pieces fit in.
VOCABULARY = 528


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        if not isinstance(tensor, DTensor):
            return cls(tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach().clone())
        _, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return cls(tuple(tensor.shape), tuple(offset), tensor.detach().to_local().clone())


Parts = dict[str, Part]


@dataclass
class Trace:
    """What some steps were like on a rank.

    Attributes:
        losses: of each step.
        grad_norms: of each step.
        batch_hashes: of each step.
        gradients: of each step, what this rank holds of them.
        weights: after the last step, what this rank holds of them.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    batch_hashes: list[int] = field(default_factory=list)
    gradients: list[Parts] = field(default_factory=list)
    weights: Parts = field(default_factory=dict)


def assembled(parts: Sequence[Parts]) -> dict[str, Tensor]:
    """The whole tensors that the ranks' parts make up; ranks that hold the same must agree."""
    wholes: dict[str, Tensor] = {}
    for rank_parts in parts:
        for name, part in rank_parts.items():
            whole = wholes.setdefault(name, torch.full(part.shape, torch.nan))
            place = whole[tuple(map(slice, part.offset, _ends(part)))]
            assert (place.isnan() | (place == part.values)).all(), f"{name}: ranks disagree"
            place.copy_(part.values)
    for name, whole in wholes.items():
        assert not whole.isnan().any(), f"{name}: no rank holds some of it"
    return wholes


def _ends(part: Part) -> list[int]:
    return [first + size for first, size in zip(part.offset, part.values.shape, strict=True)]


def parity_config(data: Path, **changes: Any) -> Config:
    """Eight small layers whose sizes divide over 2, 3 and 4 ranks; rows of two lengths."""
    tree: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 11},
        "model": {
            "num_layers": 8,
            "hidden_size": 48,
            "ffn_hidden_size": 48,
            "num_attention_heads": 12,
            "num_query_groups": 1,
            "max_position_embeddings": 64,
            "vocab_size": VOCABULARY,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "init_std": 0.1,
        },
        "data": {
            "tokenizer": str(data / "tiny.model"),
            "train": [{"prefix": str(data / "train")}],
        },
        "curriculum": [{"seq_length": 24, "steps": 2}, {"seq_length": 48, "steps": 4}],
        "batch": {"global_size": 8, "micro_size": 4},
        "precision": {"compute": "fp32"},
        # A tiny eps would turn a gradient that is only rounding noise into a full step.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
    }
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return Config.model_validate(tree)


def build(config: Config) -> tuple[RankModel, ShardedOptimizer]:
    """What this rank holds under the configuration's layout."""
    topology = Topology.of(config.parallel, torch.device("cpu"))
    check_config(config, world_size=torch.distributed.get_world_size(), vocab_size=VOCABULARY)
    model = build_model(config, VOCABULARY, topology)
    optimizer = build_optimizer(config, model)
    return model, optimizer


def take_steps(
    config: Config, model: RankModel, optimizer: ShardedOptimizer, steps: range
) -> Trace:
    """Take these steps (1-based) of the configuration's curriculum."""
    trace, topology = Trace(), model.topology
    source = training_source(config, Tokenizer.load(Path(config.data.tokenizer)))
    curriculum = Curriculum(config)

    def global_batch(step: int) -> GlobalBatch:
        span = curriculum.at(step)
        layout = BatchLayout.of(
            config, span.global_size, span.seq_length, topology.data_parallel_size
        )
        return GlobalBatch(span.rows_of(step), span.index, layout)

    memory = HostMemory.for_device(topology.device)
    batches = map(global_batch, steps)
    reader = ReadAhead(source, topology.data_parallel_rank, batches, memory, 1)
    recorder = _GradientRecorder(optimizer, model, trace)
    with closing(reader):
        for micro_batches in reader:
            agreement = agree(micro_batches, False, topology)
            result = take_step(
                model, recorder, micro_batches, agreement.masked_tokens, config.optimizer.lr
            )  # type: ignore[arg-type]
            trace.batch_hashes.append(agreement.batch_hash)
            numbers = result.read(math.inf)
            trace.losses.append(numbers.loss)
            trace.grad_norms.append(numbers.grad_norm)
    trace.weights = {name: Part.of(p) for name, p in model.named_parameters().items()}
    return trace


class _GradientRecorder:
    """Stands for the optimizer and notes what it is given."""

    def __init__(self, optimizer: ShardedOptimizer, model: RankModel, trace: Trace) -> None:
        self._optimizer, self._model, self._trace = optimizer, model, trace

    def step(self, learning_rate: float, loss: Tensor) -> Update:
        gradients: Parts = {}
        for name, parameter in self._model.named_parameters().items():
            assert parameter.grad is not None, name
            gradients[name] = Part.of(parameter.grad)
        self._trace.gradients.append(gradients)
        return self._optimizer.step(learning_rate, loss)


def trace_of(config: Config) -> Trace:
    """Three steps from the beginning: into the second row length."""
    model, optimizer = build(config)
    return take_steps(config, model, optimizer, range(1, STEPS + 1))


def traces_of(configs: Sequence[Config]) -> list[Trace]:
    """The same for several runs on the same ranks."""
    return [trace_of(config) for config in configs]
