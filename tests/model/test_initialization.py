from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_bert.model.initialization import initialize_weights
from megatron_bert.model.norm import LayerNorm
from tests.small_model import small_config


class _Model(nn.Module):
    def __init__(self, *, with_a_scale: bool = False) -> None:
        super().__init__()
        self.after_attention = LayerNorm(8, 1e-5, bias=True)
        if with_a_scale:
            self.layer_scale = nn.Parameter(torch.empty(8))


def test_a_norm_starts_at_one_and_its_bias_at_zero_whatever_its_name() -> None:
    model = _Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    initialize_weights(model, small_config().model, seed=7)
    assert model.after_attention.weight.tolist() == [1.0] * 8
    assert model.after_attention.bias.tolist() == [0.0] * 8


def test_a_vector_that_is_neither_a_norms_scale_nor_a_bias_does_not_start_at_zero_unasked() -> None:
    with pytest.raises(AssertionError, match="layer_scale: neither"):
        initialize_weights(_Model(with_a_scale=True), small_config().model, seed=7)
