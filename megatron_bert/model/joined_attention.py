"""Attention whose queries, keys and values are the columns of one array, for CUDA.

One product gives them and takes their gradient, which kernels write where it belongs: nothing is
split, copied or put together again.

Shape suffixes: B rows, S slots, N = B x S tokens, H query heads, G key/value heads, K head size, F
columns, (H + 2 G) x K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.flash_attention import PackedAttention
from megatron_bert.parallel.column_sums import column_sums


def joined_attention(
    qkv_BSF: Tensor, bias_F: Tensor | None, groups: int, size: int, attention: PackedAttention
) -> Tensor:
    """Softmax attention within each segment of a packed row.

    Args:
        qkv_BSF: [B, S, F] queries, then keys, then values, each head by head.
        bias_F: [F], which was added to them and gets its gradient, their sum, from here; None:
            there is none, or it has its gradient from elsewhere.
        groups: G.
        size: K.
        attention: the rows' segments, and what is dropped.

    Returns:
        [B, S, H, K].
    """
    out_BSHK: Tensor = _JoinedAttention.apply(qkv_BSF, bias_F, groups, size, attention)  # type: ignore[no-untyped-call]
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
        bias: Tensor | None,
        groups: int,
        size: int,
        attention: PackedAttention,
    ) -> Tensor:
        out, log_sum = attention.forward(*_heads(qkv, groups, size))
        ctx.groups, ctx.size, ctx.attention = groups, size, attention
        ctx.bias_dtype = None if bias is None else bias.dtype
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
            sums=ctx.bias_dtype is not None,
        )
        bias_grad = None
        if sums is not None:
            q_sums, kv_sums = sums
            parts = [q_sums.flatten(1), *kv_sums.flatten(2)]
            bias_grad = torch.cat([column_sums(part, ctx.bias_dtype) for part in parts])
        return grad, bias_grad, None, None, None
