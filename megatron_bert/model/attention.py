"""Self-attention over packed rows.

Shape suffixes: B rows, S slots, N = B x S tokens, T tokens that this rank holds, D hidden, H query
heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_bert.config.schema import ModelConfig
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.model.rotary import Rotation
from megatron_bert.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from megatron_bert.parallel.random import hash_dropout


@dataclass(frozen=True)
class PackedLayout:
    """Which slots of a row may see each other, made once a micro-batch for layers of a kind.

    Attributes:
        bias_B1SS: [B, 1, S, S] in the compute type, added to attention scores: 0 where query and
            key share a segment and the window, minus infinity elsewhere.
        rotation: of queries and keys by their positions, where positions are rotary.
    """

    bias_B1SS: Tensor
    rotation: Rotation | None = None

    @property
    def rows(self) -> int:
        """B."""
        return self.bias_B1SS.shape[0]

    @classmethod
    def of(
        cls, model: ModelConfig, positions_BS: Tensor, dtype: torch.dtype, *, is_local: bool
    ) -> PackedLayout:
        """The layout of a model's local layers, or of the others."""
        layout = cls.from_positions(
            positions_BS, dtype, model.local_attention // 2 if is_local else None
        )
        if not model.family.rotary:
            return layout
        theta = model.local_rope_theta if is_local else model.rope_theta
        return replace(
            layout, rotation=Rotation.from_positions(positions_BS, model.head_dim, theta)
        )

    @classmethod
    def from_positions(
        cls, positions_BS: Tensor, dtype: torch.dtype, reach: int | None = None
    ) -> PackedLayout:
        """Derive the segments from positions, which restart at 0 in each of them.

        Args:
            positions_BS: [B, S].
            dtype: the compute type.
            reach: how many tokens a token sees to each side. Default: its whole segment.
        """
        segment_BS = (positions_BS == 0).cumsum(1)
        apart_BSS = segment_BS[:, :, None] != segment_BS[:, None, :]
        if reach is not None:
            # Within a segment the distance of slots is that of positions.
            apart_BSS |= (positions_BS[:, :, None] - positions_BS[:, None, :]).abs() > reach
        bias_BSS = torch.zeros(apart_BSS.shape, dtype=dtype, device=positions_BS.device)
        return cls(bias_BSS.masked_fill_(apart_BSS, -math.inf)[:, None])


def attend(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    layout: PackedLayout,
    dropout: float = 0.0,
    dropout_keys_B: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """Softmax attention within each segment of a packed row.

    Every kernel stands behind this function; `written_out_attention` runs everywhere and is the
    reference for others.

    Args:
        q_BHSK: [B, H, S, K] queries.
        k_BGSK: [B, G, S, K] keys; G divides H, each serves H / G neighbouring query heads.
        v_BGSK: [B, G, S, K] values.
        layout: which slots see each other.
        dropout: probability of dropping an attention weight.
        dropout_keys_B: int64 [B], needed where `dropout` is above 0.
        first_head: number of the first query head within the whole layer.

    Returns:
        [B, H, S, K].
    """
    # On the CPU PyTorch's own kernel takes 2 to 5 times as long, forward and backward, in bf16.
    if q_BHSK.is_cuda and dropout == 0.0:
        return F.scaled_dot_product_attention(
            q_BHSK,
            k_BGSK,
            v_BGSK,
            attn_mask=layout.bias_B1SS,
            enable_gqa=q_BHSK.shape[1] != k_BGSK.shape[1],
        )
    return written_out_attention(
        q_BHSK, k_BGSK, v_BGSK, layout, dropout, dropout_keys_B, first_head
    )


def written_out_attention(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    layout: PackedLayout,
    dropout: float,
    dropout_keys_B: Tensor | None,
    first_head: int,
) -> Tensor:
    """`attend` as two matrix products and a softmax; scores are held in the compute type.

    The query heads of a group stand below one another, so that keys and values are read where
    they are, however many heads they serve.
    """
    B, H, S, K = q_BHSK.shape
    G = k_BGSK.shape[1]
    scores_BHSS = ((q_BHSK / math.sqrt(K)).reshape(B, G, -1, K) @ k_BGSK.mT).view(B, H, S, S)
    weights_BHSS = (scores_BHSS + layout.bias_B1SS).softmax(-1)
    if dropout > 0.0:
        assert dropout_keys_B is not None
        # A kernel would draw from a generator, whose state would have to be saved and would
        # depend on the layout of ranks; the hash depends on neither.
        weights_BHSS = hash_dropout(weights_BHSS, dropout, dropout_keys_B, first_head * S * S)
    return (weights_BHSS.view(B, G, -1, S) @ v_BGSK).view(B, H, S, K)


class SelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, its heads split over the ranks.

    Key and value heads are split like the query heads while they divide over the ranks, else
    every rank holds all of them and uses those that its query heads belong to.

    With `recompute` scores and softmax, which are held for every pair of slots, are computed again
    backward (Korthikanti et al. 2022, section 5: selective activation recomputation).
    """

    def __init__(
        self, model: ModelConfig, tp: TensorParallelGroup, *, recompute: bool = False
    ) -> None:
        super().__init__()
        groups = model.num_query_groups
        replicated = groups % tp.size != 0
        kv_size = groups * model.head_dim
        hidden, bias = model.hidden_size, model.family.biases
        self.query = ColumnParallelLinear(hidden, hidden, tp, bias=bias)
        self.key = ColumnParallelLinear(hidden, kv_size, tp, bias=bias, replicated=replicated)
        self.value = ColumnParallelLinear(hidden, kv_size, tp, bias=bias, replicated=replicated)
        self.output = RowParallelLinear(hidden, hidden, tp, bias=bias)
        self.tp = tp
        self.recompute = recompute
        self.head_dim = model.head_dim
        self.dropout = model.attention_dropout
        self.first_head = model.num_attention_heads // tp.size * tp.rank
        self.local_heads = model.num_attention_heads // tp.size
        self.heads_per_group = model.num_attention_heads // groups
        self.selects_kv_heads = replicated and groups > 1

    def forward(self, x_TD: Tensor, layout: PackedLayout, dropout_keys_B: Tensor) -> Tensor:
        """[T, D] -> [T, D], the tokens that this rank holds."""
        q, k, v = (
            projected.view(layout.rows, -1, projected.shape[1] // self.head_dim, self.head_dim)
            for projected in column_parallel(x_TD, (self.query, self.key, self.value), self.tp)
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if layout.rotation is not None:
            q, k = layout.rotation.apply(q), layout.rotation.apply(k)
        if self.selects_kv_heads:
            k, v = self._of_local_heads(k), self._of_local_heads(v)
        dropout = self.dropout if self.training else 0.0
        mixed_BHSK: Tensor
        arguments = (q, k, v, layout, dropout, dropout_keys_B, self.first_head)
        if self.recompute and self.training:
            # Nothing is drawn from a generator, so that there is no state to keep.
            mixed_BHSK = checkpoint(
                attend, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            mixed_BHSK = attend(*arguments)
        y_TD: Tensor = self.output(mixed_BHSK.transpose(1, 2).flatten(2).flatten(0, 1))
        return y_TD

    def _of_local_heads(self, x_BGSK: Tensor) -> Tensor:
        """[B, G, S, K] -> [B, H, S, K]: for each query head of this rank its key/value head."""
        # Not by a list of indices: that is copied to the GPU, and waited for, in every layer.
        repeated = x_BGSK.repeat_interleave(self.heads_per_group, dim=1)
        return repeated.narrow(1, self.first_head, self.local_heads)
