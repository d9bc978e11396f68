"""Triton kernels of `flash_attention`: one forward, two backward.

Arrays are slot-major: queries, outputs and their gradients [B, S, H, K], keys and values
[B, S, G, K], statistics of queries [B, H, S]. Queries and their gradients, keys and values may be
columns of a wider array, whose slots are so many elements apart (`q_step`, `kv_step`, `dq_step`);
the others are dense. A program takes a tile of queries over the tiles of keys that they see, or of
keys over queries; only tiles through which a segment's or a window's border runs are masked. The
grid has one axis, as the others are short.

What bounds these kernels is instructions issued, more than products or bytes: no hash of a vector
is made in a loop.

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
_GROUP = tl.constexpr(random.GROUP)
_GROUP_OFFSET = tl.constexpr(random.GROUP_OFFSET)
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
def _group_draws(numbers):
    """What `element_draws` adds for the group of elements that these are in, as int32."""
    draws = _mix(tl.cast(numbers // _GROUP, tl.uint32) ^ _GROUP_OFFSET)
    return draws.to(tl.int32, bitcast=True)


@triton.jit
def _member_draws(numbers):
    """What it adds for their places within the group, as int32."""
    return _mix((numbers % _GROUP).to(tl.uint32) ^ _ELEMENT_OFFSET).to(tl.int32, bitcast=True)


@triton.jit
def _pair_draws(draws, members, first, KEYS: tl.constexpr):
    """Sums of queries' and keys' draws, of a tile of keys; `members` are those of the first one.

    A tile that is a group has the members of every other one, and queries are added its group's.
    """
    if KEYS == _GROUP:
        return (draws + _group_draws(first))[:, None] + members[None, :]
    keys = first + tl.arange(0, KEYS)
    return draws[:, None] + (_group_draws(keys) + _member_draws(keys))[None, :]


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

    Those before and behind the whole ones are masked.

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
    return low, whole_low, whole_high, high


@triton.jit
def _load(ARRAY, offsets, inside, MASKED: tl.constexpr):
    """Load vectors [slots, K]; zeros past the row's end."""
    if MASKED:
        return tl.load(ARRAY + offsets, mask=inside[:, None], other=0.0)
    return tl.load(ARRAY + offsets)


@triton.jit
def _load_number(ARRAY, slots, inside, MASKED: tl.constexpr):
    """Load a number of each slot; zeros past the row's end."""
    if MASKED:
        return tl.load(ARRAY + slots, mask=inside, other=0)
    return tl.load(ARRAY + slots)


@triton.jit
def _nothing(number):
    """Zero, which the compiler does not know: else it selects among halves of BF16 pairs."""
    return number * 0.0


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
    channels = head * SIZE + tl.arange(0, SIZE)[None, :]
    q = _load(Q, (row * S + slots[:, None]) * q_step + channels, inside, True)
    K += row * S * kv_step + head // SHARING * SIZE
    V += row * S * kv_step + head // SHARING * SIZE
    draws, members = tl.zeros([QUERIES], tl.int32), tl.zeros([KEYS], tl.int32)
    if DROPOUT:
        members = _member_draws(tl.arange(0, KEYS))
        draws = _vector_draws(
            tl.load(ROW_KEYS + row).to(tl.uint32), (first_head + head) * S + slots
        )
    nothing = _nothing(scale)
    acc = tl.zeros([QUERIES, SIZE], tl.float32)
    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for first_key in range(low, high, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        offsets = keys[:, None] * kv_step + tl.arange(0, SIZE)[None, :]
        k = _load(K, offsets, keys < S, not EVEN)
        v = _load(V, offsets, keys < S, not EVEN)
        # Scaled in the exponent, in one instruction with the subtraction; `scale` is positive.
        scores = tl.dot(q, tl.trans(k))
        if (first_key < whole_low) | (first_key >= whole_high):
            visible = _sees(slots[:, None], begins[:, None], ends[:, None], keys[None, :], REACH)
            scores = tl.where(visible, scores, -float("inf"))
        highest_now = tl.maximum(highest, tl.max(scores, 1) * scale)
        # A query that has seen no key yet has nothing but minus infinities.
        reference = tl.where(highest_now == -float("inf"), 0.0, highest_now)
        weights = tl.exp2(scores * scale - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            kept = is_kept(_pair_draws(draws, members, first_key, KEYS), threshold)
            weights = tl.where(kept, weights, nothing)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        highest = highest_now
    # Slots past the row's end have seen nothing; nor are they stored.
    total = tl.where(inside, total, 1.0)
    out = (acc * (keep_scale / total)[:, None]).to(OUT.dtype.element_ty)
    offsets = (row * S + slots[:, None]) * heads * SIZE + channels
    tl.store(OUT + offsets, out, mask=inside[:, None])
    tl.store(LOG_SUM + (row * heads + head) * S + slots, highest + tl.log2(total), mask=inside)


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
    low, whole_low, whole_high, high = _ranges(BEGINS, ENDS, row, first, S, QUERIES, KEYS, REACH)
    K += row * S * kv_step + head // SHARING * SIZE
    V += row * S * kv_step + head // SHARING * SIZE
    channels = head * SIZE + tl.arange(0, SIZE)[None, :]
    q = _load(Q, (row * S + slots[:, None]) * q_step + channels, inside, True)
    offsets = (row * S + slots[:, None]) * heads * SIZE + channels
    do = _load(DO, offsets, inside, True)
    out = _load(OUT, offsets, inside, True)
    statistics = (row * heads + head) * S + slots
    log_sum = tl.load(LOG_SUM + statistics, mask=inside, other=0.0)
    # What softmax's gradient subtracts: the weights' mean gradient, weighted by the weights. Kept
    # weights are scaled up at the end, not one by one, so that this is scaled down.
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1) / keep_scale
    tl.store(DELTA + statistics, delta, mask=inside)
    draws, members = tl.zeros([QUERIES], tl.int32), tl.zeros([KEYS], tl.int32)
    if DROPOUT:
        members = _member_draws(tl.arange(0, KEYS))
        draws = _vector_draws(
            tl.load(ROW_KEYS + row).to(tl.uint32), (first_head + head) * S + slots
        )
        tl.store(DRAWS + statistics, draws, mask=inside)
    dq = tl.zeros([QUERIES, SIZE], tl.float32)
    for first_key in range(low, high, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        kv_offsets = keys[:, None] * kv_step + tl.arange(0, SIZE)[None, :]
        k = _load(K, kv_offsets, keys < S, not EVEN)
        v = _load(V, kv_offsets, keys < S, not EVEN)
        weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
        if (first_key < whole_low) | (first_key >= whole_high):
            visible = _sees(slots[:, None], begins[:, None], ends[:, None], keys[None, :], REACH)
            weights = tl.where(visible, weights, 0.0)
        weight_grads = tl.dot(do, tl.trans(v))
        if DROPOUT:
            kept = is_kept(_pair_draws(draws, members, first_key, KEYS), threshold)
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
    low, whole_low, whole_high, high = _ranges(BEGINS, ENDS, row, first, S, KEYS, QUERIES, REACH)
    kv_offset = row * S * kv_step + part_head // SHARING * SIZE
    channels = tl.arange(0, SIZE)[None, :]
    k = _load(K + kv_offset, keys[:, None] * kv_step + channels, inside, True)
    v = _load(V + kv_offset, keys[:, None] * kv_step + channels, inside, True)
    key_draws = tl.zeros([KEYS], tl.int32)
    if DROPOUT:
        key_draws = _group_draws(keys) + _member_draws(keys)
    nothing = _nothing(scale)
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
            q = _load(Q + q_offset, slots[:, None] * q_step + channels, near, not EVEN)
            do = _load(DO + do_offset, slots[:, None] * heads * SIZE + channels, near, not EVEN)
            log_sum = _load_number(LOG_SUM + statistics, slots, near, not EVEN)
            delta = _load_number(DELTA + statistics, slots, near, not EVEN)
            weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
            if (first_query < whole_low) | (first_query >= whole_high):
                begins = tl.load(BEGINS + row * S + slots, mask=near, other=0)
                ends = tl.load(ENDS + row * S + slots, mask=near, other=0)
                visible = _sees(
                    slots[:, None], begins[:, None], ends[:, None], keys[None, :], REACH
                )
                weights = tl.where(visible, weights, 0.0)
            weight_grads = tl.dot(do, tl.trans(v))
            dropped = weights
            if DROPOUT:
                draws = _load_number(DRAWS + statistics, slots, near, not EVEN)
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
        # Keys past the row's end are not masked, as what they give is not stored.
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
