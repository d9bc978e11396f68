"""Triton kernels of `flash_attention`'s backward pass.

Arrays and names are those of `flash_kernels`. One kernel computes the queries' gradient, one that
of keys and values, and the last adds up the parts of the latter where several programs share a key
head.
"""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.model.flash_tiles import (
    load,
    load_number,
    pair_draws,
    ranges,
    sees,
    unknown_zero,
)
from megatron_bert.parallel.random_kernels import (
    group_draws,
    is_kept,
    member_draws,
    vector_draws,
)


@triton.jit
def flash_query_gradient_kernel(
    Q,
    K,
    V,
    OUT,
    LOG_SUM,
    DO,
    DELTA,
    DRAWS,
    DQ,
    DQ_SUMS,
    BEGINS,
    ENDS,
    ROW_KEYS,
    q_step,
    kv_step,
    dq_step,
    S,
    heads,
    first_head,
    scale,
    gradient_scale,
    threshold,
    keep_scale,
    SHARING: tl.constexpr,
    DROPOUT: tl.constexpr,
    REACH: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    SUMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The queries' gradient, and what `flash_key_gradient_kernel` needs of each query.

    That is DELTA and, with dropout, DRAWS, int32 [B, H, S]. With SUMS also the gradient's sum over
    each tile's queries, DQ_SUMS fp32 [B * tiles, H, K].

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
    K += row * S * kv_step + head // SHARING * SIZE
    V += row * S * kv_step + head // SHARING * SIZE
    channels = head * SIZE + tl.arange(0, SIZE)[None, :]
    q = load(Q, (row * S + slots[:, None]) * q_step + channels, inside, True)
    offsets = (row * S + slots[:, None]) * heads * SIZE + channels
    do = load(DO, offsets, inside, True)
    out = load(OUT, offsets, inside, True)
    statistics = (row * heads + head) * S + slots
    log_sum = tl.load(LOG_SUM + statistics, mask=inside, other=0.0)
    # What softmax's gradient subtracts: the weights' mean gradient, weighted by the weights. Kept
    # weights are scaled up at the end, not one by one, so this is scaled down here.
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1) / keep_scale
    tl.store(DELTA + statistics, delta, mask=inside)
    draws, members = tl.zeros([QUERIES], tl.int32), tl.zeros([KEYS], tl.int32)
    if DROPOUT:
        members = member_draws(tl.arange(0, KEYS))
        draws = vector_draws(tl.load(ROW_KEYS + row).to(tl.uint32), (first_head + head) * S + slots)
        tl.store(DRAWS + statistics, draws, mask=inside)
    dq = tl.zeros([QUERIES, SIZE], tl.float32)
    for first_key in range(low, high, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        kv_offsets = keys[:, None] * kv_step + tl.arange(0, SIZE)[None, :]
        k = load(K, kv_offsets, keys < S, not EVEN)
        v = load(V, kv_offsets, keys < S, not EVEN)
        weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
        if (first_key < whole_low) | (first_key >= whole_high):
            visible = sees(slots[:, None], begins[:, None], ends[:, None], keys[None, :], REACH)
            weights = tl.where(visible, weights, 0.0)
        weight_grads = tl.dot(do, tl.trans(v))
        if DROPOUT:
            kept = is_kept(pair_draws(draws, members, first_key, KEYS), threshold)
            weight_grads = tl.where(kept, weight_grads, 0.0)
        score_grads = weights * (weight_grads - delta[:, None])
        dq = tl.dot(score_grads.to(k.dtype), k, dq)
    dq *= gradient_scale * keep_scale
    if SUMS:
        # Past the row's end gradients are 0.
        sums = DQ_SUMS + ((row * tiles + first // QUERIES) * heads + head) * SIZE
        tl.store(sums + tl.arange(0, SIZE), tl.sum(dq, 0))
    offsets = (row * S + slots[:, None]) * dq_step + channels
    tl.store(DQ + offsets, dq.to(DQ.dtype.element_ty), mask=inside[:, None])


@triton.jit
def flash_key_gradient_kernel(
    Q,
    K,
    V,
    LOG_SUM,
    DO,
    DELTA,
    DRAWS,
    DK,
    DV,
    DKV_SUMS,
    BEGINS,
    ENDS,
    q_step,
    kv_step,
    dkv_step,
    S,
    heads,
    scale,
    gradient_scale,
    threshold,
    keep_scale,
    SHARING: tl.constexpr,
    HEADS: tl.constexpr,
    DROPOUT: tl.constexpr,
    REACH: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    SUMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The keys' and values' gradients, [B, S, H / HEADS, K], each summed over HEADS heads.

    With SUMS also their sums over each tile's keys, DKV_SUMS fp32 [2, B * tiles, H / HEADS, K].

    Grid: B * H / HEADS * tiles of keys.
    """
    tiles = tl.cdiv(S, KEYS)
    first = tl.program_id(0) % tiles * KEYS
    parts = heads // HEADS
    row = (tl.program_id(0) // tiles // parts).to(tl.int64)
    part_head = tl.program_id(0) // tiles % parts * HEADS
    keys = first + tl.arange(0, KEYS)
    inside = keys < S
    low, whole_low, whole_high, high = ranges(BEGINS, ENDS, row, first, S, KEYS, QUERIES, REACH)
    kv_offset = row * S * kv_step + part_head // SHARING * SIZE
    channels = tl.arange(0, SIZE)[None, :]
    k = load(K + kv_offset, keys[:, None] * kv_step + channels, inside, True)
    v = load(V + kv_offset, keys[:, None] * kv_step + channels, inside, True)
    key_draws = tl.zeros([KEYS], tl.int32)
    if DROPOUT:
        key_draws = group_draws(keys) + member_draws(keys)
    nothing = unknown_zero(scale)
    dk = tl.zeros([KEYS, SIZE], tl.float32)
    dv = tl.zeros([KEYS, SIZE], tl.float32)
    for number in range(HEADS):
        head = part_head + number
        q_offset = row * S * q_step + head * SIZE
        do_offset = (row * S * heads + head) * SIZE
        statistics = (row * heads + head) * S
        for first_query in range(low, high, QUERIES):
            slots = first_query + tl.arange(0, QUERIES)
            near = slots < S
            q = load(Q + q_offset, slots[:, None] * q_step + channels, near, not EVEN)
            do = load(DO + do_offset, slots[:, None] * heads * SIZE + channels, near, not EVEN)
            log_sum = load_number(LOG_SUM + statistics, slots, near, not EVEN)
            delta = load_number(DELTA + statistics, slots, near, not EVEN)
            weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
            if (first_query < whole_low) | (first_query >= whole_high):
                begins = tl.load(BEGINS + row * S + slots, mask=near, other=0)
                ends = tl.load(ENDS + row * S + slots, mask=near, other=0)
                visible = sees(slots[:, None], begins[:, None], ends[:, None], keys[None, :], REACH)
                weights = tl.where(visible, weights, 0.0)
            weight_grads = tl.dot(do, tl.trans(v))
            dropped = weights
            if DROPOUT:
                draws = load_number(DRAWS + statistics, slots, near, not EVEN)
                kept = is_kept(draws[:, None] + key_draws[None, :], threshold)
                dropped = tl.where(kept, weights, nothing)
                weight_grads = tl.where(kept, weight_grads, 0.0)
            dv = tl.dot(tl.trans(dropped.to(do.dtype)), do, dv)
            score_grads = weights * (weight_grads - delta[:, None])
            dk = tl.dot(tl.trans(score_grads.to(q.dtype)), q, dk)
    dk *= gradient_scale * keep_scale
    dv *= keep_scale
    part = part_head // HEADS
    if SUMS:
        # Keys past the row's end were not masked before, since their gradients are not stored.
        sums = DKV_SUMS + ((row * tiles + first // KEYS) * parts + part) * SIZE + channels
        there = inside[:, None]
        tl.store(sums, tl.sum(tl.where(there, dk, 0.0), 0)[None, :])
        values = tl.cast(tl.num_programs(0), tl.int64) * SIZE
        tl.store(sums + values, tl.sum(tl.where(there, dv, 0.0), 0)[None, :])
    offsets = (row * S + keys[:, None]) * dkv_step + part * SIZE + channels
    tl.store(DK + offsets, dk.to(DK.dtype.element_ty), mask=inside[:, None])
    tl.store(DV + offsets, dv.to(DV.dtype.element_ty), mask=inside[:, None])


@triton.jit
def flash_key_sum_kernel(
    DK_PARTS,
    DV_PARTS,
    DK,
    DV,
    N,
    dkv_step,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The keys' and values' gradients from their parts, fp32 [N, G * PARTS, K], N = B * S.

    Grid: G * tiles of slots.
    """
    tiles = tl.cdiv(N, SLOTS)
    group = tl.program_id(0) // tiles
    slots = (tl.program_id(0) % tiles).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    inside = (slots < N)[:, None]
    channels = tl.arange(0, SIZE)[None, :]
    dk = tl.zeros([SLOTS, SIZE], tl.float32)
    dv = tl.zeros([SLOTS, SIZE], tl.float32)
    for part in tl.static_range(PARTS):
        offsets = (slots[:, None] * GROUPS + group) * PARTS * SIZE + part * SIZE + channels
        dk += tl.load(DK_PARTS + offsets, mask=inside, other=0.0)
        dv += tl.load(DV_PARTS + offsets, mask=inside, other=0.0)
    offsets = slots[:, None] * dkv_step + group * SIZE + channels
    tl.store(DK + offsets, dk.to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + offsets, dv.to(DV.dtype.element_ty), mask=inside)
