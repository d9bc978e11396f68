"""One transformer block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megatron_bert.config.schema import ModelConfig
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.model.attention import PackedLayout, SelfAttention
from megatron_bert.model.feed_forward import FeedForward
from megatron_bert.parallel.random import hash_dropout


@dataclass(frozen=True)
class BlockDropoutKeys:
    """The keys of one block's dropout masks, int64 [B] each."""

    attention_weights_B: Tensor
    attention_B: Tensor
    feed_forward_B: Tensor


class Block(nn.Module):
    """PreNorm block: x + dropout(attention(norm(x))), then x + dropout(ffn(norm(x)))."""

    def __init__(self, model: ModelConfig, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(model.hidden_size, eps=model.norm_eps)
        self.attention = SelfAttention(model, tp)
        self.feed_forward_norm = nn.LayerNorm(model.hidden_size, eps=model.norm_eps)
        self.feed_forward = FeedForward(model, tp)
        self.dropout = model.hidden_dropout

    def forward(self, x_BSD: Tensor, layout: PackedLayout, keys: BlockDropoutKeys) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        dropout = self.dropout if self.training else 0.0
        y_BSD = self.attention(self.attention_norm(x_BSD), layout, keys.attention_weights_B)
        x_BSD = x_BSD + hash_dropout(y_BSD, dropout, keys.attention_B)
        y_BSD = self.feed_forward(self.feed_forward_norm(x_BSD))
        return x_BSD + hash_dropout(y_BSD, dropout, keys.feed_forward_B)
