"""Triton kernels of `flash_attention`: one forward, two backward.

Arrays are slot-major: queries, outputs and their gradients [B, S, H, K], keys and values
[B, S, G, K], statistics of queries fp32 [B, H, S], all of them dense. A program takes a tile of
queries over the tiles of keys that they see, or of keys over queries; only tiles through which a
segment's or a window's border runs are masked. The grid has one axis, as the others are short.

Shape suffixes: B rows, S slots, H query heads, G key/value heads, K head size.
"""

# Types are Triton's own, of values that stand on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.parallel import random

_FIRST_FACTOR = tl.constexpr(random.FIRST_FACTOR)
_SECOND_FACTOR = tl.constexpr(random.SECOND_FACTOR)
_ROW_OFFSET = tl.constexpr(random.ROW_OFFSET)
_ELEMENT_OFFSET = tl.constexpr(random.ELEMENT_OFFSET)


@triton.jit
def _mix(x):
    """`mix32`."""
    x = (x ^ (x >> 16)) * _FIRST_FACTOR
    x = (x ^ (x >> 15)) * _SECOND_FACTOR
    return x ^ (x >> 15)


@triton.jit
def _vector_draws(key, numbers):
    """`vector_draws` of query slots, as int32."""
    draws = _mix((numbers.to(tl.uint32) * ((key >> 1) | 1)) ^ _mix(key ^ _ROW_OFFSET))
    return draws.to(tl.int32, bitcast=True)


@triton.jit
def _element_draws(numbers):
    """`element_draws` of key slots, as int32."""
    return _mix(numbers.to(tl.uint32) ^ _ELEMENT_OFFSET).to(tl.int32, bitcast=True)


@triton.jit
def is_kept(draws, threshold):
    """Which elements `hash_dropout` keeps, of sums of draws."""
    return draws * draws >= threshold


@triton.jit
def _sees(slots, begins, ends, others, REACH: tl.constexpr):
    """Which of the other slots share segment and window with slots; both broadcast."""
    visible = (others >= begins) & (others < ends)
    if REACH >= 0:
        distance = slots - others
        visible = visible & (distance <= REACH) & (distance >= -REACH)
    return visible


@triton.jit
def _ranges(
    BEGINS, ENDS, row, first, S, SIZE: tl.constexpr, OTHER: tl.constexpr, REACH: tl.constexpr
):
    """Which tiles of others a tile of slots sees: from, whole from, whole until, until.

    Begins and ends of segments never decrease along a row, so the first and the last slot tell.
    """
    last = tl.minimum(first + SIZE, S) - 1
    low = tl.load(BEGINS + row * S + first)
    high = tl.load(ENDS + row * S + last)
    whole_low = tl.load(BEGINS + row * S + last)
    whole_high = tl.load(ENDS + row * S + first)
    if REACH >= 0:
        low = tl.maximum(low, first - REACH)
        high = tl.minimum(high, last + 1 + REACH)
        whole_low = tl.maximum(whole_low, last - REACH)
        whole_high = tl.minimum(whole_high, first + 1 + REACH)
    low = low // OTHER * OTHER
    whole_low = tl.cdiv(whole_low, OTHER) * OTHER
    whole_high = whole_high // OTHER * OTHER
    # Where no tile is seen whole, all are masked, and none is computed twice.
    none = whole_low >= whole_high
    whole_low = tl.where(none, high, whole_low)
    whole_high = tl.where(none, high, whole_high)
    return low, whole_low, whole_high, high


@triton.jit
def _load(ARRAY, offsets, inside, MASKED: tl.constexpr):
    """Load vectors [slots, K]; zeros past the row's end."""
    if MASKED:
        return tl.load(ARRAY + offsets, mask=inside[:, None], other=0.0)
    return tl.load(ARRAY + offsets)


@triton.jit
def _load_statistic(ARRAY, slots, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ARRAY + slots, mask=inside, other=0.0)
    return tl.load(ARRAY + slots)


@triton.jit
def _forward_tiles(
    state,
    q,
    K,
    V,
    kv_step,
    slots,
    begins,
    ends,
    draws,
    low,
    high,
    S,
    scale,
    threshold,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    REACH: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Take a tile of queries over tiles of keys from `low` until `high`."""
    acc, highest, total = state
    for first in range(low, high, KEYS):
        keys = first + tl.arange(0, KEYS)
        offsets = keys[:, None] * kv_step + tl.arange(0, SIZE)[None, :]
        k = _load(K, offsets, keys < S, MASKED)
        v = _load(V, offsets, keys < S, MASKED)
        scores = tl.dot(q, tl.trans(k)) * scale
        if MASKED:
            visible = _sees(slots[:, None], begins[:, None], ends[:, None], keys[None, :], REACH)
            scores = tl.where(visible, scores, -float("inf"))
        highest_now = tl.maximum(highest, tl.max(scores, 1))
        # A query that has seen no key yet has nothing but minus infinities.
        reference = highest_now
        if MASKED:
            reference = tl.where(highest_now == -float("inf"), 0.0, highest_now)
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            kept = is_kept(draws[:, None] + _element_draws(keys)[None, :], threshold)
            weights = tl.where(kept, weights, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        highest = highest_now
    return acc, highest, total


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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Outputs, and each query's logarithm (base 2) of its sum of exponentials.

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
    low, whole_low, whole_high, high = _ranges(BEGINS, ENDS, row, first, S, QUERIES, KEYS, REACH)
    kv_step = heads // SHARING * SIZE
    offsets = row * S * heads * SIZE + head * SIZE + slots[:, None] * heads * SIZE
    offsets += tl.arange(0, SIZE)[None, :]
    q = _load(Q, offsets, inside, True)
    kv_offset = row * S * kv_step + head // SHARING * SIZE
    draws = tl.zeros([QUERIES], tl.int32)
    if DROPOUT:
        draws = _vector_draws(
            tl.load(ROW_KEYS + row).to(tl.uint32), (first_head + head) * S + slots
        )
    state = (
        tl.zeros([QUERIES, SIZE], tl.float32),
        tl.full([QUERIES], -float("inf"), tl.float32),
        tl.zeros([QUERIES], tl.float32),
    )
    for part in tl.static_range(3):
        begin = low if part == 0 else (whole_low if part == 1 else whole_high)
        end = whole_low if part == 0 else (whole_high if part == 1 else high)
        state = _forward_tiles(
            state, q, K + kv_offset, V + kv_offset, kv_step, slots, begins, ends, draws,
            begin, end, S, scale, threshold, part != 1, DROPOUT, REACH, SIZE, KEYS,
        )  # fmt: skip
    acc, highest, total = state
    # Slots past the row's end have seen nothing; nor are they stored.
    total = tl.where(inside, total, 1.0)
    out = (acc * (keep_scale / total)[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + offsets, out, mask=inside[:, None])
    tl.store(LOG_SUM + (row * heads + head) * S + slots, highest + tl.log2(total), mask=inside)


@triton.jit
def _query_gradient_tiles(
    dq,
    q,
    do,
    log_sum,
    delta,
    K,
    V,
    kv_step,
    slots,
    begins,
    ends,
    draws,
    low,
    high,
    S,
    scale,
    threshold,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    REACH: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Take a tile of queries over tiles of keys from `low` until `high`."""
    for first in range(low, high, KEYS):
        keys = first + tl.arange(0, KEYS)
        offsets = keys[:, None] * kv_step + tl.arange(0, SIZE)[None, :]
        k = _load(K, offsets, keys < S, MASKED)
        v = _load(V, offsets, keys < S, MASKED)
        weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
        if MASKED:
            visible = _sees(slots[:, None], begins[:, None], ends[:, None], keys[None, :], REACH)
            weights = tl.where(visible, weights, 0.0)
        weight_grads = tl.dot(do, tl.trans(v))
        if DROPOUT:
            kept = is_kept(draws[:, None] + _element_draws(keys)[None, :], threshold)
            weight_grads = tl.where(kept, weight_grads, 0.0)
        score_grads = weights * (weight_grads - delta[:, None])
        dq = tl.dot(score_grads.to(k.dtype), k, dq)
    return dq


@triton.jit
def flash_query_gradient_kernel(
    Q,
    K,
    V,
    OUT,
    LOG_SUM,
    DO,
    DELTA,
    DQ,
    BEGINS,
    ENDS,
    ROW_KEYS,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The queries' gradient, and what `flash_key_gradient_kernel` needs of each query: DELTA.

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
    low, whole_low, whole_high, high = _ranges(BEGINS, ENDS, row, first, S, QUERIES, KEYS, REACH)
    kv_step = heads // SHARING * SIZE
    kv_offset = row * S * kv_step + head // SHARING * SIZE
    offsets = row * S * heads * SIZE + head * SIZE + slots[:, None] * heads * SIZE
    offsets += tl.arange(0, SIZE)[None, :]
    q = _load(Q, offsets, inside, True)
    do = _load(DO, offsets, inside, True)
    out = _load(OUT, offsets, inside, True)
    statistics = (row * heads + head) * S + slots
    log_sum = tl.load(LOG_SUM + statistics, mask=inside, other=0.0)
    # What softmax's gradient subtracts: the weights' mean gradient, weighted by the weights. Kept
    # weights are scaled up at the end, not one by one, so that this is scaled down.
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1) / keep_scale
    tl.store(DELTA + statistics, delta, mask=inside)
    draws = tl.zeros([QUERIES], tl.int32)
    if DROPOUT:
        draws = _vector_draws(
            tl.load(ROW_KEYS + row).to(tl.uint32), (first_head + head) * S + slots
        )
    dq = tl.zeros([QUERIES, SIZE], tl.float32)
    for part in tl.static_range(3):
        begin = low if part == 0 else (whole_low if part == 1 else whole_high)
        end = whole_low if part == 0 else (whole_high if part == 1 else high)
        dq = _query_gradient_tiles(
            dq, q, do, log_sum, delta, K + kv_offset, V + kv_offset, kv_step,
            slots, begins, ends, draws, begin, end, S, scale, threshold,
            part != 1, DROPOUT, REACH, SIZE, KEYS,
        )  # fmt: skip
    dq = (dq * (gradient_scale * keep_scale)).to(DQ.dtype.element_ty)
    tl.store(DQ + offsets, dq, mask=inside[:, None])


@triton.jit
def _key_gradient_tiles(
    dk,
    dv,
    k,
    v,
    Q,
    DO,
    LOG_SUM,
    DELTA,
    BEGINS,
    ENDS,
    q_step,
    keys,
    row_key,
    element_draws,
    first_number,
    low,
    high,
    S,
    scale,
    threshold,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    REACH: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Take a tile of keys over tiles of one head's queries; scores stand transposed."""
    for first in range(low, high, QUERIES):
        slots = first + tl.arange(0, QUERIES)
        inside = slots < S
        offsets = slots[:, None] * q_step + tl.arange(0, SIZE)[None, :]
        q = _load(Q, offsets, inside, MASKED)
        do = _load(DO, offsets, inside, MASKED)
        log_sum = _load_statistic(LOG_SUM, slots, inside, MASKED)
        delta = _load_statistic(DELTA, slots, inside, MASKED)
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - log_sum[None, :])
        if MASKED:
            begins = tl.load(BEGINS + slots, mask=inside, other=0)
            ends = tl.load(ENDS + slots, mask=inside, other=0)
            visible = _sees(slots[None, :], begins[None, :], ends[None, :], keys[:, None], REACH)
            weights = tl.where(visible, weights, 0.0)
        weight_grads = tl.dot(v, tl.trans(do))
        dropped = weights
        if DROPOUT:
            draws = _vector_draws(row_key, first_number + slots)
            kept = is_kept(draws[None, :] + element_draws[:, None], threshold)
            dropped = tl.where(kept, weights, 0.0)
            weight_grads = tl.where(kept, weight_grads, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv)
        score_grads = weights * (weight_grads - delta[None, :])
        dk = tl.dot(score_grads.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def flash_key_gradient_kernel(
    Q,
    K,
    V,
    LOG_SUM,
    DO,
    DELTA,
    DK,
    DV,
    BEGINS,
    ENDS,
    ROW_KEYS,
    S,
    heads,
    first_head,
    scale,
    gradient_scale,
    threshold,
    keep_scale,
    SHARING: tl.constexpr,
    HEADS: tl.constexpr,
    DROPOUT: tl.constexpr,
    REACH: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The keys' and values' gradients, fp32 [B, H / HEADS, S, K], each summed over HEADS heads.

    Grid: B * H / HEADS * tiles of keys.
    """
    tiles = tl.cdiv(S, KEYS)
    first = tl.program_id(0) % tiles * KEYS
    parts = heads // HEADS
    row = (tl.program_id(0) // tiles // parts).to(tl.int64)
    part_head = tl.program_id(0) // tiles % parts * HEADS
    keys = first + tl.arange(0, KEYS)
    inside = keys < S
    low, whole_low, whole_high, high = _ranges(BEGINS, ENDS, row, first, S, KEYS, QUERIES, REACH)
    q_step, kv_step = heads * SIZE, heads // SHARING * SIZE
    kv_offset = row * S * kv_step + part_head // SHARING * SIZE
    channels = tl.arange(0, SIZE)[None, :]
    k = _load(K + kv_offset, keys[:, None] * kv_step + channels, inside, True)
    v = _load(V + kv_offset, keys[:, None] * kv_step + channels, inside, True)
    row_key = tl.full((), 0, tl.uint32)
    element_draws = _element_draws(keys)
    if DROPOUT:
        row_key = tl.load(ROW_KEYS + row).to(tl.uint32)
    dk = tl.zeros([KEYS, SIZE], tl.float32)
    dv = tl.zeros([KEYS, SIZE], tl.float32)
    for number in range(HEADS):
        head = part_head + number
        q_offset = row * S * q_step + head * SIZE
        statistics = (row * heads + head) * S
        for part in tl.static_range(3):
            begin = low if part == 0 else (whole_low if part == 1 else whole_high)
            end = whole_low if part == 0 else (whole_high if part == 1 else high)
            dk, dv = _key_gradient_tiles(
                dk, dv, k, v, Q + q_offset, DO + q_offset, LOG_SUM + statistics,
                DELTA + statistics, BEGINS + row * S, ENDS + row * S, q_step, keys,
                row_key, element_draws, (first_head + head) * S, begin, end, S, scale, threshold,
                part != 1, DROPOUT, REACH, SIZE, QUERIES,
            )  # fmt: skip
    offsets = ((row * parts + part_head // HEADS) * S + keys[:, None]) * SIZE + channels
    tl.store(DK + offsets, dk * (gradient_scale * keep_scale), mask=inside[:, None])
    tl.store(DV + offsets, dv * keep_scale, mask=inside[:, None])
