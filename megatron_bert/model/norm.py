"""The norm that is used throughout the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from megatron_bert.config.schema import ModelConfig

NormKernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Computes LayerNorm in place of PyTorch, backward too: of x [..., D], weight, bias and epsilon."""


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension.

    Attributes:
        kernel: computes the norm; None leaves it to PyTorch.
    """

    def __init__(self, size: int, eps: float, *, bias: bool) -> None:
        super().__init__(size, eps=eps, bias=bias)
        self.kernel: NormKernel | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if self.kernel is None:
            return super().forward(x)
        return self.kernel(x, self.weight, self.bias, self.eps)


def layer_norm(model: ModelConfig) -> LayerNorm:
    """LayerNorm over the hidden size, with a bias where the architecture has biases."""
    return LayerNorm(model.hidden_size, model.norm_eps, bias=model.family.biases)
