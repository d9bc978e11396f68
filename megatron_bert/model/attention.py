"""Self-attention over packed rows.

Shape suffixes: B rows, S slots, N = B x S tokens, T tokens that this rank holds, D hidden, H query
heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_bert.config.schema import ModelConfig
from megatron_bert.distributed.device_facts import facts_of
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.model.rotary import Rotation
from megatron_bert.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from megatron_bert.parallel.random import element_draws, hash_dropout, vector_draws


@dataclass(frozen=True)
class PackedLayout:
    """Which slots of a row may see each other, made once per micro-batch for layers of one kind.

    Attributes:
        begins_BS: int32 [B, S], the first slot of each slot's segment.
        ends_BS: int32 [B, S], the slot after its last.
        reach: how many slots a slot sees to each side; None where it sees its whole segment.
        bias_B1SS: [B, 1, S, S] in the compute type, added to attention scores: 0 where query and
            key share a segment and the window, minus infinity elsewhere. None where a kernel finds
            them from begins and ends.
        rotation: rotates queries and keys by their positions, where positions are rotary.
    """

    begins_BS: Tensor
    ends_BS: Tensor
    reach: int | None = None
    bias_B1SS: Tensor | None = None
    rotation: Rotation | None = None

    @property
    def rows(self) -> int:
        """B."""
        return self.begins_BS.shape[0]

    @classmethod
    def of(
        cls, model: ModelConfig, positions_BS: Tensor, dtype: torch.dtype, *, is_local: bool
    ) -> PackedLayout:
        """The layout of a model's local layers, or of the others."""
        reach = model.local_attention // 2 if is_local else None
        layout = cls.from_positions(positions_BS, reach)
        if not has_kernel(positions_BS.device, dtype, model.head_dim):
            layout = layout.with_bias(dtype)
        if not model.family.rotary:
            return layout
        theta = model.local_rope_theta if is_local else model.rope_theta
        return replace(
            layout, rotation=Rotation.from_positions(positions_BS, model.head_dim, theta)
        )

    @classmethod
    def from_positions(cls, positions_BS: Tensor, reach: int | None = None) -> PackedLayout:
        """Derive the segments from positions, which restart at 0 in each of them.

        Args:
            positions_BS: [B, S].
            reach: how many tokens a token sees to each side. Default: its whole segment.
        """
        slots_S = torch.arange(positions_BS.shape[1], device=positions_BS.device)
        # A segment's last slot gets the segment's end, the others the row's. The minimum from the
        # right then gives every slot its segment's end.
        next_BS = (slots_S + 1).masked_fill(positions_BS.roll(-1, 1) != 0, len(slots_S))
        ends_BS = next_BS.flip(1).cummin(1).values.flip(1)
        return cls((slots_S - positions_BS).int(), ends_BS.int(), reach)

    def with_bias(self, dtype: torch.dtype) -> PackedLayout:
        """The same layout, with what `written_out_attention` adds to scores of a type."""
        slots_S = torch.arange(self.begins_BS.shape[1], device=self.begins_BS.device)
        apart_BSS = self.begins_BS[:, :, None] != self.begins_BS[:, None, :]
        if self.reach is not None:
            apart_BSS |= (slots_S[:, None] - slots_S).abs() > self.reach
        bias_BSS = torch.zeros(apart_BSS.shape, dtype=dtype, device=apart_BSS.device)
        return replace(self, bias_B1SS=bias_BSS.masked_fill_(apart_BSS, -math.inf)[:, None])


def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `flash_attention` takes heads of this size and type on this device."""
    compute = "bf16" if dtype == torch.bfloat16 else "fp32"
    return facts_of(device).runs_our_attention(compute, head_dim)


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

    All kernels are called through this function; `written_out_attention` runs everywhere and is the
    reference for the others.

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
    if layout.bias_B1SS is None:
        # Imported here: Triton comes with PyTorch for CUDA only.
        from megatron_bert.model.flash_attention import flash_attention

        return flash_attention(
            q_BHSK.transpose(1, 2),
            k_BGSK.transpose(1, 2),
            v_BGSK.transpose(1, 2),
            layout.begins_BS,
            layout.ends_BS,
            layout.reach,
            dropout,
            dropout_keys_B,
            first_head,
        ).transpose(1, 2)
    return written_out_attention(
        q_BHSK, k_BGSK, v_BGSK, layout.bias_B1SS, dropout, dropout_keys_B, first_head
    )


def written_out_attention(
    q_BHSK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    bias_B1SS: Tensor,
    dropout: float,
    dropout_keys_B: Tensor | None,
    first_head: int,
) -> Tensor:
    """`attend` as two matrix products and a softmax; scores are held in the compute type.

    The query heads of a group are stacked along the slots, so that keys and values are read in
    place, however many heads they serve. On the CPU, PyTorch's own kernel takes 2 to 5 times as
    long, forward and backward, in bf16.
    """
    B, H, S, K = q_BHSK.shape
    G = k_BGSK.shape[1]
    scores_BHSS = ((q_BHSK / math.sqrt(K)).reshape(B, G, -1, K) @ k_BGSK.mT).view(B, H, S, S)
    weights_BHSS = (scores_BHSS + bias_B1SS).softmax(-1)
    if dropout > 0.0:
        assert dropout_keys_B is not None
        # A generator's state would have to be saved and would depend on the layout of ranks; the
        # hash depends on neither.
        numbers_HS = torch.arange(H * S, device=q_BHSK.device).view(H, S) + first_head * S
        draws_BHS = vector_draws(dropout_keys_B[:, None, None], numbers_HS)
        weights_BHSS = hash_dropout(
            weights_BHSS, dropout, draws_BHS, element_draws(S, q_BHSK.device)
        )
    return (weights_BHSS.view(B, G, -1, S) @ v_BGSK).view(B, H, S, K)


class SelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, its heads split over the ranks.

    Key and value heads are split like the query heads while they divide over the ranks, else
    every rank holds all of them and uses those that its query heads belong to.

    With `recompute`, scores and softmax are computed again in backward (Korthikanti et al. 2022,
    section 5: selective activation recomputation) where they are held for every pair of slots,
    which no kernel does.
    """

    def __init__(
        self, model: ModelConfig, tp: TensorParallelGroup, *, recompute: bool = False
    ) -> None:
        super().__init__()
        groups, kv_size = model.num_query_groups, model.kv_size
        replicated = model.kv_ranks(tp.size) < tp.size
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
        q, k, v = column_parallel(x_TD, (self.query, self.key, self.value), self.tp)
        y_TD: Tensor = self.output(self.mix(q, k, v, layout, dropout_keys_B))
        return y_TD

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, dropout_keys_B: Tensor
    ) -> Tensor:
        """Queries, keys and values, [N, heads x K], by this rank's heads -> [N, H x K]."""
        q, k, v = (
            projected.view(layout.rows, -1, projected.shape[1] // self.head_dim, self.head_dim)
            for projected in (q, k, v)
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if layout.rotation is not None:
            q, k = layout.rotation.apply(q), layout.rotation.apply(k)
        if self.selects_kv_heads:
            k, v = self._of_local_heads(k), self._of_local_heads(v)
        dropout = self.dropout if self.training else 0.0
        mixed_BHSK: Tensor
        arguments = (q, k, v, layout, dropout, dropout_keys_B, self.first_head)
        if self.recompute and self.training and layout.bias_B1SS is not None:
            # Nothing is drawn from a generator, so that there is no state to keep.
            mixed_BHSK = checkpoint(
                attend, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            mixed_BHSK = attend(*arguments)
        return mixed_BHSK.transpose(1, 2).flatten(2).flatten(0, 1)

    def mixes_joined(self, layout: PackedLayout) -> bool:
        """Whether `mix_joined` applies: our kernels, on queries and keys as the product gives."""
        rotates = layout.rotation is not None
        return layout.bias_B1SS is None and not rotates and not self.selects_kv_heads

    def mix_joined(
        self,
        qkv_NF: Tensor,
        biases: Sequence[Tensor],
        layout: PackedLayout,
        dropout_keys_B: Tensor,
    ) -> Tensor:
        """`mix` for queries, keys and values that are columns of one product.

        Args:
            qkv_NF: [N, F] queries, keys and values side by side, each head by head.
            biases: the biases that were added to them, which get their gradients from here.
            layout: which slots see each other.
            dropout_keys_B: int64 [B].
        """
        # Imported here: Triton comes with PyTorch for CUDA only.
        from megatron_bert.model.flash_attention import PackedAttention
        from megatron_bert.model.joined_attention import joined_attention

        attention = PackedAttention.of(
            layout.begins_BS,
            layout.ends_BS,
            layout.reach,
            self.dropout if self.training else 0.0,
            dropout_keys_B,
            self.first_head,
        )
        groups = (qkv_NF.shape[1] // self.head_dim - self.local_heads) // 2
        qkv_BSF = qkv_NF.view(layout.rows, -1, qkv_NF.shape[1])
        mixed_BSHK = joined_attention(qkv_BSF, biases, groups, self.head_dim, attention)
        return mixed_BSHK.flatten(2).flatten(0, 1)

    def _of_local_heads(self, x_BGSK: Tensor) -> Tensor:
        """[B, G, S, K] -> [B, H, S, K]: for each query head of this rank its key/value head."""
        # Not by a list of indices, which would be copied to the GPU and waited for in every layer.
        repeated = x_BGSK.repeat_interleave(self.heads_per_group, dim=1)
        return repeated.narrow(1, self.first_head, self.local_heads)
