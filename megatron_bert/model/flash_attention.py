"""Attention over packed rows that holds no scores, for CUDA (Dao 2023, "FlashAttention-2").

Written in Triton, so that three things hold that no ready kernel offers together: weights are
dropped by this project's hash, the same ones on every layout of ranks and in a recomputed forward
pass; shapes are fixed, as a tile of queries finds the keys that it sees from where its segments
begin and end; and no sum depends on the order in which tiles finish, so that the same input gives
the same bits.

Shape suffixes: B rows, S slots, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_bert.model import flash_kernels
from megatron_bert.parallel.random import keep_threshold

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up.

    Attributes:
        queries: of a tile.
        keys: of a tile.
        warps: that share a tile.
        stages: of tiles that are loaded ahead.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As a kernel's launch takes them."""
        return {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class Tiling:
    """Every kernel's tiles, those that were quickest on an H100 with heads of 64 channels.

    Attributes:
        forward: of the forward kernel.
        query_gradient: of the queries' gradient.
        key_gradient: of the keys' and values' gradient.
        key_gradient_parts: programs to which the heads that share keys are dealt, at most.
    """

    forward: Tile = Tile(64, 64, 4, 3)
    query_gradient: Tile = Tile(64, 32, 4, 3)
    key_gradient: Tile = Tile(32, 64, 4, 3)
    key_gradient_parts: int = 2


TILING = Tiling()


def flash_attention(
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    begins_BS: Tensor,
    ends_BS: Tensor,
    reach: int | None = None,
    dropout: float = 0.0,
    dropout_keys_B: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """Softmax attention within each segment of a packed row; see `megatron_bert.model.attention`.

    Args:
        q_BSHK: [B, S, H, K] queries, K one of 16, 32, 64 and 128.
        k_BSGK: [B, S, G, K] keys; G divides H.
        v_BSGK: [B, S, G, K] values.
        begins_BS: int32 [B, S], the first slot of each slot's segment.
        ends_BS: int32 [B, S], the slot after its last.
        reach: how many slots a slot sees to each side. Default: its whole segment.
        dropout: probability of dropping an attention weight.
        dropout_keys_B: int64 [B], needed where `dropout` is above 0.
        first_head: number of the first query head within the whole layer.

    Returns:
        [B, S, H, K].
    """
    assert dropout == 0.0 or dropout_keys_B is not None
    assert begins_BS.shape == ends_BS.shape == q_BSHK.shape[:2]
    keys_B = begins_BS if dropout_keys_B is None else dropout_keys_B
    reach = -1 if reach is None else reach
    out_BSHK: Tensor = _flash_forward(
        q_BSHK,
        k_BSGK,
        v_BSGK,
        begins_BS.contiguous(),
        ends_BS.contiguous(),
        keys_B,
        reach,
        dropout,
        first_head,
    )[0]
    return out_BSHK


@torch.library.custom_op("megatron_bert::flash_forward", mutates_args=())
def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor,
    ends: Tensor,
    keys: Tensor,
    reach: int,
    dropout: float,
    first_head: int,
) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    B, S, H, K = q.shape
    out, log_sum = q.new_empty((B, S, H, K)), q.new_empty((B, H, S), dtype=torch.float32)
    tile = TILING.forward
    flash_kernels.flash_forward_kernel[(triton.cdiv(S, tile.queries) * B * H,)](
        q, k, v, out, log_sum, begins, ends, keys, S, H, first_head,
        _LOG2_E / math.sqrt(K), keep_threshold(dropout), 1.0 / (1.0 - dropout),
        SHARING=H // k.shape[2], DROPOUT=dropout > 0.0, REACH=reach, SIZE=K, **tile.options(),
    )  # fmt: skip
    return out, log_sum


@_flash_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, S, H, K = q.shape
    return q.new_empty((B, S, H, K)), q.new_empty((B, H, S), dtype=torch.float32)


@torch.library.custom_op("megatron_bert::flash_backward", mutates_args=())
def _flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    begins: Tensor,
    ends: Tensor,
    keys: Tensor,
    reach: int,
    dropout: float,
    first_head: int,
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v = do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    B, S, H, K = q.shape
    G = k.shape[2]
    dq, delta = torch.empty_like(do), torch.empty_like(log_sum)
    dropping = (keep_threshold(dropout), 1.0 / (1.0 - dropout))
    scales = (_LOG2_E / math.sqrt(K), 1.0 / math.sqrt(K))
    meta = {"SHARING": H // G, "DROPOUT": dropout > 0.0, "REACH": reach, "SIZE": K}
    tile = TILING.query_gradient
    flash_kernels.flash_query_gradient_kernel[(triton.cdiv(S, tile.queries) * B * H,)](
        q, k, v, out, log_sum, do, delta, dq, begins, ends, keys, S, H, first_head,
        *scales,
        *dropping, **meta, **tile.options(),
    )  # fmt: skip
    parts = max(n for n in range(1, TILING.key_gradient_parts + 1) if H // G % n == 0)
    dk, dv = (k.new_empty((B, G * parts, S, K), dtype=torch.float32) for _ in range(2))
    tile = TILING.key_gradient
    flash_kernels.flash_key_gradient_kernel[(triton.cdiv(S, tile.keys) * B * G * parts,)](
        q, k, v, log_sum, do, delta, dk, dv, begins, ends, keys, S, H, first_head,
        *scales,
        *dropping, **meta, HEADS=H // G // parts, **tile.options(),
    )  # fmt: skip
    # [B, G x parts, S, K] -> [B, S, G, K]
    dk, dv = (x.view(B, G, parts, S, K).sum(2).transpose(1, 2).to(k.dtype) for x in (dk, dv))
    return dq, dk.contiguous(), dv.contiguous()


@_flash_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reach, ctx.dropout, ctx.first_head = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _flash_backward(do, *ctx.saved_tensors, ctx.reach, ctx.dropout, ctx.first_head)
    return (*grads, None, None, None, None, None, None)


_flash_forward.register_autograd(_backward, setup_context=_keep_for_backward)
