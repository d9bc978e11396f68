"""The norm of every place of the model."""

from __future__ import annotations

from torch import nn

from megatron_bert.config.schema import ModelConfig


def layer_norm(model: ModelConfig) -> nn.LayerNorm:
    """LayerNorm over the hidden size, with a bias where the architecture has biases."""
    return nn.LayerNorm(model.hidden_size, eps=model.norm_eps, bias=model.family.biases)
