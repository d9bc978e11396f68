"""Attention over packed rows that holds no scores, for CUDA (Dao 2023, "FlashAttention-2").

Written in Triton for three properties that no existing kernel offers together: weights are dropped
by this project's hash, the same ones on every layout of ranks and in a recomputed forward pass;
shapes are fixed, as a tile of queries finds the keys that it sees from where its segments begin and
end; and no sum depends on the order in which tiles finish, so that the same input gives the same
bits.

Shape suffixes: B rows, S slots, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.model import flash_gradient_kernels, flash_kernels, flash_tiles
from megatron_bert.model.flash_tiles import AttentionTile
from megatron_bert.parallel.random import keep_threshold

_LOG2_E = math.log2(math.e)
_SUMMED_SLOTS = 32


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
    attention = PackedAttention.of(begins_BS, ends_BS, reach, dropout, dropout_keys_B, first_head)
    out_BSHK: Tensor = _flash_forward(q_BSHK, k_BSGK, v_BSGK, *attention.arguments())[0]
    return out_BSHK


@dataclass(frozen=True)
class PackedAttention:
    """The kernels for given rows and layer, with their inputs other than queries, keys and values.

    Attributes:
        begins_BS: see `flash_attention`.
        ends_BS: the same.
        keys_B: the same; any integers where nothing is dropped.
        reach: the same; -1 for the whole segment.
        dropout: the same.
        first_head: the same.
    """

    begins_BS: Tensor
    ends_BS: Tensor
    keys_B: Tensor
    reach: int
    dropout: float
    first_head: int

    @classmethod
    def of(
        cls,
        begins_BS: Tensor,
        ends_BS: Tensor,
        reach: int | None,
        dropout: float,
        dropout_keys_B: Tensor | None,
        first_head: int,
    ) -> PackedAttention:
        """From the arguments of `flash_attention`."""
        assert dropout == 0.0 or dropout_keys_B is not None
        return cls(
            begins_BS.contiguous(),
            ends_BS.contiguous(),
            begins_BS if dropout_keys_B is None else dropout_keys_B,
            -1 if reach is None else reach,
            dropout,
            first_head,
        )

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int, float, int]:
        """All attributes, as operators take them."""
        return (
            self.begins_BS, self.ends_BS, self.keys_B, self.reach, self.dropout, self.first_head
        )  # fmt: skip

    def forward(self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """The output [B, S, H, K], and fp32 [B, H, S] for backward."""
        q, k, v = _even(q_BSHK, k_BSGK, v_BSGK)
        B, S, H, K = q.shape
        out, log_sum = q.new_empty((B, S, H, K)), q.new_empty((B, H, S), dtype=torch.float32)
        tile = flash_tiles.ATTENTION_TILING.forward.of_heads(K)
        flash_kernels.flash_forward_kernel[(ceil_div(S, tile.queries) * B * H,)](
            q, k, v, out, log_sum, self.begins_BS, self.ends_BS, self.keys_B,
            q.stride(1), k.stride(1), S, H, self.first_head,
            _LOG2_E / math.sqrt(K), *self._dropping(), **self._meta(q, k, tile), **tile.options(),
        )  # fmt: skip
        return out, log_sum

    def backward(
        self,
        do_BSHK: Tensor,
        q_BSHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        out_BSHK: Tensor,
        log_sum_BHS: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor],
        *,
        sums: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Write the gradients of queries, keys and values into tensors of their shapes.

        Returns:
            With `sums`, parts of the gradients' sums over all slots: fp32 [parts, H, K] and
            [2, parts, G, K].
        """
        do, (q, k, v), (dq, dk, dv) = do_BSHK.contiguous(), _even(q_BSHK, k_BSGK, v_BSGK), gradients
        (B, S, H, K), G = q.shape, k.shape[2]
        scales = (_LOG2_E / math.sqrt(K), 1.0 / math.sqrt(K))
        delta, draws = (torch.empty_like(log_sum_BHS, dtype=t) for t in (None, torch.int32))
        tile = flash_tiles.ATTENTION_TILING.query_gradient.of_heads(K)
        tiles = B * ceil_div(S, tile.queries)
        q_sums = delta.new_empty((tiles if sums else 0, H, K))
        flash_gradient_kernels.flash_query_gradient_kernel[(tiles * H,)](
            q, k, v, out_BSHK, log_sum_BHS, do, delta, draws, dq, q_sums,
            self.begins_BS, self.ends_BS, self.keys_B, q.stride(1), k.stride(1), dq.stride(1),
            S, H, self.first_head, *scales, *self._dropping(), SUMS=sums,
            **self._meta(q, k, tile), **tile.options(),
        )  # fmt: skip
        tile = flash_tiles.ATTENTION_TILING.key_gradient.of_heads(K)
        tiles = B * ceil_div(S, tile.keys)
        parts = _parts(tiles * G, H // G)
        written = (dk, dv)
        if parts > 1:
            written = tuple(delta.new_empty((2, B, S, G * parts, K)))
        kv_sums = delta.new_empty((2, tiles if sums else 0, G * parts, K))
        flash_gradient_kernels.flash_key_gradient_kernel[(tiles * G * parts,)](
            q, k, v, log_sum_BHS, do, delta, draws, *written, kv_sums,
            self.begins_BS, self.ends_BS, q.stride(1), k.stride(1), written[0].stride(1),
            S, H, *scales, *self._dropping(), HEADS=H // G // parts, SUMS=sums,
            **self._meta(q, k, tile), **tile.options(),
        )  # fmt: skip
        if parts > 1:
            flash_gradient_kernels.flash_key_sum_kernel[(ceil_div(B * S, _SUMMED_SLOTS) * G,)](
                *written, dk, dv, B * S, dk.stride(1),
                GROUPS=G, PARTS=parts, SIZE=K, SLOTS=_SUMMED_SLOTS, enable_fp_fusion=True,
            )  # fmt: skip
            # [2, tiles, G x parts, K] -> [2, tiles x parts, G, K]
            kv_sums = kv_sums.view(2, -1, G, parts, K).transpose(2, 3).flatten(1, 2)
        return (q_sums, kv_sums) if sums else None

    def _dropping(self) -> tuple[int, float]:
        return keep_threshold(self.dropout), 1.0 / (1.0 - self.dropout)

    def _meta(self, q_BSHK: Tensor, k_BSGK: Tensor, tile: AttentionTile) -> dict[str, int | bool]:
        return {
            "EVEN": q_BSHK.shape[1] % math.lcm(tile.queries, tile.keys) == 0,
            "SHARING": q_BSHK.shape[2] // k_BSGK.shape[2],
            "DROPOUT": self.dropout > 0.0,
            "REACH": self.reach,
            "SIZE": q_BSHK.shape[3],
        }


def _even(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same three, with slots evenly spaced, as the kernels need; copied where they are not."""

    def is_even(x: Tensor) -> bool:
        return x.stride()[2:] == (x.shape[3], 1) and x.stride(0) == x.shape[1] * x.stride(1)

    q = q if is_even(q) else q.contiguous()
    if not (is_even(k) and is_even(v) and k.stride() == v.stride()):
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


def _parts(programs: int, heads: int) -> int:
    """How many programs divide the heads that share keys: as few as keep a GPU busy.

    If there are several, each writes a part of the gradient in fp32, and the parts are then summed.
    """
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    return next(
        (n for n in divisors if n * programs >= flash_tiles.ATTENTION_TILING.key_gradient_programs),
        heads,
    )


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
    return PackedAttention(begins, ends, keys, reach, dropout, first_head).forward(q, k, v)


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
    attention = PackedAttention(begins, ends, keys, reach, dropout, first_head)
    gradients = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    attention.backward(do, q, k, v, out, log_sum, gradients)
    return gradients


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
