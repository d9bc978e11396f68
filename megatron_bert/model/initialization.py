"""Initial weights: each element a function of (seed, parameter's name, element number).

No rank ever makes a whole tensor, and every layout starts from the same weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# What DCP itself uses to place shards, those of two mesh axes on one dimension included.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_bert.config.schema import ModelConfig
from megatron_bert.model.norm import LayerNorm
from megatron_bert.parallel.linear import RowParallelLinear
from megatron_bert.parallel.random import fill_normal


@torch.no_grad()
def initialize_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of this rank in place.

    Matrices and embeddings are N(0, init_std^2); the projections into the residual stream are
    scaled down by sqrt(2 layers), since as many of them are summed (Radford et al. 2019, "GPT-2",
    section 2.3; Megatron-LM's scaled init). Norms start at 1, biases at 0.

    The modules tell which is which: a block's row-parallel layers are its projections into the
    residual stream.
    """
    for name, parameter in model.named_parameters():
        shard, offset = _local_shard(parameter)
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        if parameter.dim() == 1:
            is_scale = isinstance(module, LayerNorm) and own_name == "weight"
            assert is_scale or own_name == "bias", f"{name}: neither a norm's scale nor a bias"
            shard.fill_(1.0 if is_scale else 0.0)
            continue
        std = config.init_std
        if isinstance(module, RowParallelLinear):
            std /= math.sqrt(2 * config.num_layers)
        fill_normal(
            shard, global_shape=parameter.shape, offset=offset, std=std, seed=seed, name=name
        )


def _local_shard(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), tuple(offset)
