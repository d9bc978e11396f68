"""Gated feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.config.schema import ModelConfig
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel


class FeedForward(nn.Module):
    """SwiGLU with biases: down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU Variants")."""

    def __init__(self, model: ModelConfig, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.gate = ColumnParallelLinear(model.hidden_size, model.ffn_hidden_size, tp)
        self.up = ColumnParallelLinear(model.hidden_size, model.ffn_hidden_size, tp)
        self.down = RowParallelLinear(model.ffn_hidden_size, model.hidden_size, tp)
        self.tp = tp

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D], the tokens that this rank holds."""
        gate, up = column_parallel(x_TD, (self.gate, self.up), self.tp)
        y: Tensor = self.down(F.silu(gate) * up)
        return y
