"""Gated feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.config.schema import ModelConfig
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """SwiGLU or GEGLU: down(activation(gate(x)) * up(x)) (Shazeer 2020, "GLU Variants")."""

    def __init__(self, model: ModelConfig, tp: TensorParallelGroup) -> None:
        super().__init__()
        hidden, ffn, bias = model.hidden_size, model.ffn_hidden_size, model.family.biases
        self.gate = ColumnParallelLinear(hidden, ffn, tp, bias=bias)
        self.up = ColumnParallelLinear(hidden, ffn, tp, bias=bias)
        self.down = RowParallelLinear(ffn, hidden, tp, bias=bias)
        self.activation = ACTIVATIONS[model.family.activation]
        self.tp = tp

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D], the tokens that this rank holds."""
        gate, up = column_parallel(x_TD, (self.gate, self.up), self.tp)
        y: Tensor = self.down(self.activation(gate) * up)
        return y
