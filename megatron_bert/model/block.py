"""One transformer block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_bert.config.schema import ModelConfig, Recompute
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.model.attention import PackedLayout, SelfAttention
from megatron_bert.model.feed_forward import FeedForward
from megatron_bert.model.norm import layer_norm
from megatron_bert.parallel.partial_gradients import per_token
from megatron_bert.parallel.random import hash_dropout


@dataclass(frozen=True)
class BlockDropout:
    """What one block's dropout masks are made of.

    Attributes:
        attention_weights_B: int64 [B], keys of the rows.
        attention_T: [T], draws of this rank's tokens; like the next two, [0] where no hidden state
            is dropped.
        feed_forward_T: [T], the same for the other sub-layer.
        channels_D: [D], draws of the hidden channels.
    """

    attention_weights_B: Tensor
    attention_T: Tensor
    feed_forward_T: Tensor
    channels_D: Tensor


BlockKernel: TypeAlias = Callable[["Block", Tensor, PackedLayout, BlockDropout], Tensor]
"""Computes a block in place of its modules' calls, backward too: [T, D] -> [T, D]."""


class Block(nn.Module):
    """PreNorm block: x + dropout(attention(norm(x))), then x + dropout(ffn(norm(x))).

    Attributes:
        kernel: computes the block; if None, its modules do, one after another.
    """

    def __init__(
        self,
        model: ModelConfig,
        tp: TensorParallelGroup,
        layer: int,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.attention_norm: nn.Module = nn.Identity()
        if layer > 0 or not model.family.embedding_norm:
            self.attention_norm = per_token(layer_norm(model), tp)
        self.attention = SelfAttention(model, tp, recompute=recompute == "selective")
        self.feed_forward_norm = per_token(layer_norm(model), tp)
        self.feed_forward = FeedForward(model, tp)
        self.dropout = model.hidden_dropout
        self.recompute = recompute == "full"
        self.kernel: BlockKernel | None = None

    def forward(self, x_TD: Tensor, layout: PackedLayout, dropout: BlockDropout) -> Tensor:
        """[T, D] -> [T, D]; with full recomputation only the input is kept for backward."""
        if not (self.recompute and self.training):
            return self._compute(x_TD, layout, dropout)
        # Nothing is drawn from a generator, so that there is no state to keep.
        y_TD: Tensor = checkpoint(
            self._compute, x_TD, layout, dropout, use_reentrant=False, preserve_rng_state=False
        )
        return y_TD

    def _compute(self, x_TD: Tensor, layout: PackedLayout, dropout: BlockDropout) -> Tensor:
        if self.kernel is not None:
            return self.kernel(self, x_TD, layout, dropout)
        probability = self.dropout if self.training else 0.0
        channels_D = dropout.channels_D
        y_TD = self.attention(self.attention_norm(x_TD), layout, dropout.attention_weights_B)
        x_TD = x_TD + hash_dropout(y_TD, probability, dropout.attention_T, channels_D)
        y_TD = self.feed_forward(self.feed_forward_norm(x_TD))
        return x_TD + hash_dropout(y_TD, probability, dropout.feed_forward_T, channels_D)
