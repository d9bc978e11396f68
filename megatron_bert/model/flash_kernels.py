"""Triton kernels of `flash_attention`: here forward, and backward in `flash_gradient_kernels`.

Arrays are slot-major: queries, outputs and their gradients [B, S, H, K], keys and values [B, S, G,
K], statistics of queries [B, H, S]. Queries, keys, values and their gradients may be columns of a
wider array, with a given number of elements from slot to slot (`q_step`, `kv_step`, `dq_step`,
`dkv_step`); the others are dense. A program takes a tile of queries over the tiles of keys that
they see, or a tile of keys over queries; only tiles that a segment's or a window's border crosses
are masked. The grid has one axis, as a grid's other axes are short.

These kernels are bound by the instructions issued more than by products or bytes, so no vector is
hashed in a loop.

Shape suffixes: B rows, S slots, H query heads, G key/value heads, K head size.
"""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.model.flash_tiles import load, pair_draws, ranges, sees, unknown_zero
from megatron_bert.parallel.random_kernels import is_kept, member_draws, vector_draws


@triton.jit
def flash_forward_kernel(
    Q,
    K,
    V,
    OUT,
    LOG_SUM,
    BEGINS,
    ENDS,
    ROW_KEYS,
    q_step,
    kv_step,
    S,
    heads,
    first_head,
    scale,
    threshold,
    keep_scale,
    SHARING: tl.constexpr,
    DROPOUT: tl.constexpr,
    REACH: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Outputs, and for each query the logarithm (base 2) of its sum of exponentials.

    Grid: B * H * tiles of queries.
    """
    tiles = tl.cdiv(S, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    row = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = tl.program_id(0) // tiles % heads
    slots = first + tl.arange(0, QUERIES)
    inside = slots < S
    begins = tl.load(BEGINS + row * S + slots, mask=inside, other=0)
    ends = tl.load(ENDS + row * S + slots, mask=inside, other=0)
    low, whole_low, whole_high, high = ranges(BEGINS, ENDS, row, first, S, QUERIES, KEYS, REACH)
    channels = head * SIZE + tl.arange(0, SIZE)[None, :]
    q = load(Q, (row * S + slots[:, None]) * q_step + channels, inside, True)
    K += row * S * kv_step + head // SHARING * SIZE
    V += row * S * kv_step + head // SHARING * SIZE
    draws, members = tl.zeros([QUERIES], tl.int32), tl.zeros([KEYS], tl.int32)
    if DROPOUT:
        members = member_draws(tl.arange(0, KEYS))
        draws = vector_draws(tl.load(ROW_KEYS + row).to(tl.uint32), (first_head + head) * S + slots)
    nothing = unknown_zero(scale)
    acc = tl.zeros([QUERIES, SIZE], tl.float32)
    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for first_key in range(low, high, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        offsets = keys[:, None] * kv_step + tl.arange(0, SIZE)[None, :]
        k = load(K, offsets, keys < S, not EVEN)
        v = load(V, offsets, keys < S, not EVEN)
        # Scaled in the exponent, in one instruction with the subtraction; `scale` is positive.
        scores = tl.dot(q, tl.trans(k))
        if (first_key < whole_low) | (first_key >= whole_high):
            visible = sees(slots[:, None], begins[:, None], ends[:, None], keys[None, :], REACH)
            scores = tl.where(visible, scores, -float("inf"))
        highest_now = tl.maximum(highest, tl.max(scores, 1) * scale)
        # A query that has seen no key yet is still at minus infinity.
        reference = tl.where(highest_now == -float("inf"), 0.0, highest_now)
        weights = tl.exp2(scores * scale - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            kept = is_kept(pair_draws(draws, members, first_key, KEYS), threshold)
            weights = tl.where(kept, weights, nothing)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        highest = highest_now
    # Slots past the row's end have seen no key, and are not stored.
    total = tl.where(inside, total, 1.0)
    out = (acc * (keep_scale / total)[:, None]).to(OUT.dtype.element_ty)
    offsets = (row * S + slots[:, None]) * heads * SIZE + channels
    tl.store(OUT + offsets, out, mask=inside[:, None])
    tl.store(LOG_SUM + (row * heads + head) * S + slots, highest + tl.log2(total), mask=inside)
