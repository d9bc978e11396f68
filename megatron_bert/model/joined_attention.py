"""Attention whose queries, keys and values are the columns of one array, for CUDA.

One product computes them and takes their gradient, which the kernels write in place: nothing is
split, copied or joined again.

Shape suffixes: B rows, S slots, N = B x S tokens, H query heads, G key/value heads, K head size, F
columns, (H + 2 G) x K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.flash_attention import PackedAttention
from megatron_bert.parallel.column_sums import column_sums
from megatron_bert.parallel.gradient_sums import added_to_sums, gradient_dtype


def joined_attention(
    qkv_BSF: Tensor,
    biases: Sequence[Tensor],
    groups: int,
    size: int,
    attention: PackedAttention,
) -> Tensor:
    """Softmax attention within each segment of a packed row.

    Args:
        qkv_BSF: [B, S, F] queries, then keys, then values, each head by head.
        biases: the biases that were added to queries, keys and values; their gradients, sums over
            all slots, come from here. Empty if there are none, or theirs come from elsewhere.
        groups: G.
        size: K.
        attention: the rows' segments, and what is dropped.

    Returns:
        [B, S, H, K].
    """
    out_BSHK: Tensor = _JoinedAttention.apply(qkv_BSF, groups, size, attention, *biases)  # type: ignore[no-untyped-call]
    return out_BSHK


def _heads(qkv_BSF: Tensor, groups: int, size: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, S, H or G, K]."""
    parts = qkv_BSF.view(*qkv_BSF.shape[:2], -1, size)
    return torch.split(parts, [parts.shape[2] - 2 * groups, groups, groups], 2)


class _JoinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        groups: int,
        size: int,
        attention: PackedAttention,
        *biases: Tensor,
    ) -> Tensor:
        out, log_sum = attention.forward(*_heads(qkv, groups, size))
        ctx.groups, ctx.size, ctx.attention, ctx.biases = groups, size, attention, biases
        ctx.save_for_backward(qkv, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, log_sum = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        q_grad, k_grad, v_grad = _heads(grad, ctx.groups, ctx.size)
        sums = ctx.attention.backward(
            grads[0],
            *_heads(qkv, ctx.groups, ctx.size),
            out,
            log_sum,
            (q_grad, k_grad, v_grad),
            sums=len(ctx.biases) > 0,
        )
        bias_grads: list[Tensor | None] = []
        if sums is not None:
            q_sums, kv_sums = sums
            dtypes = [gradient_dtype(bias) for bias in ctx.biases]
            parts = (q_sums.flatten(1), *kv_sums.flatten(2))
            given = [column_sums(*pair) for pair in zip(parts, dtypes, strict=True)]
            bias_grads = added_to_sums(ctx.biases, given)
        return grad, None, None, None, *bias_grads
