"""A small configuration, its model and packed batches for tests of the upper rooms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_bert.config.schema import Config
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.model.build import RankModel, build_model
from megatron_bert.model.initialization import initialize_weights

VOCABULARY = 128
SLOTS = 32
MASKED = 5


def small_config(**changes: Any) -> Config:
    """Two layers of width 32 in fp32; `changes` are sections whose keys replace the defaults."""
    tree: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 7},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 1,
            "max_position_embeddings": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            # Wide enough that attention matters from the first step.
            "init_std": 0.2,
        },
        "data": {"tokenizer": "unused", "train": [{"prefix": "unused"}]},
        "curriculum": [{"seq_length": SLOTS, "steps": 10}],
        "batch": {"global_size": 8},
        "precision": {"compute": "fp32"},
        # With a tiny eps a gradient that is only rounding noise moves a weight by a full step.
        "optimizer": {"lr": 1e-2, "eps": 1e-4},
    }
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return Config.model_validate(tree)


def cpu_topology(**sizes: int) -> Topology:
    """The ranks of the default group on the CPU."""
    return Topology.build(torch.device("cpu"), **sizes)


def small_model(config: Config, topology: Topology) -> RankModel:
    """The sharded, initialised model of `small_config`."""
    return build_model(config, VOCABULARY, topology)


class PackedInputs(NamedTuple):
    """A micro-batch, as `data.batch.RowArrays.model_inputs` orders it."""

    tokens: Tensor
    positions: Tensor
    masked: Tensor
    labels: Tensor
    weights: Tensor
    rows: Tensor


def packed_inputs(rows: int, first_row: int = 0) -> PackedInputs:
    """Random rows of two or three segments; row n is the same whatever rows surround it."""
    drawn = [_row(first_row + n) for n in range(rows)]
    stacked = {name: torch.stack([row[name] for row in drawn]) for name in drawn[0]}
    return PackedInputs(**stacked, rows=torch.arange(first_row, first_row + rows))


def _row(number: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1000 + number)
    cuts = sorted(torch.randperm(SLOTS - 1, generator=random)[:2].add(1).tolist())
    positions = torch.cat(
        [torch.arange(end - begin) for begin, end in zip([0, *cuts], [*cuts, SLOTS], strict=True)]
    )
    return {
        "tokens": torch.randint(8, VOCABULARY, (SLOTS,), generator=random, dtype=torch.int32),
        "positions": positions.int(),
        "masked": torch.randperm(SLOTS, generator=random)[:MASKED].sort().values.int(),
        "labels": torch.randint(8, VOCABULARY, (MASKED,), generator=random, dtype=torch.int32),
        "weights": torch.tensor([1.0] * (MASKED - 1) + [float(number % 2)]),
    }


def whole_model(config: Config, topology: Topology) -> BertForPretraining:
    """The same model, its weights not sharded: parts of it can be called by themselves."""
    model = BertForPretraining(
        config.model,
        VOCABULARY,
        topology.tensor_parallel,
        config.run.seed,
        recompute=config.recompute,
    )
    initialize_weights(model, config.model, config.run.seed)
    return model
