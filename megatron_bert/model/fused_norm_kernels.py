"""Triton kernels of the residual stream and its norms, between a block's matrix products.

Each kernel reads what it needs once and sums while it writes: gradients of parameters are column
sums over all tokens, and each program adds up those of its own tokens in fp32, alongside the
gradients that it writes. Programs write their sums one below another, so that no sum depends on
which one finishes first; the number of programs depends on shapes alone.

Arrays are dense: [T, D]. Statistics are fp32 [T], draws are as `hash_dropout` takes them.

Shape suffixes: T tokens, D hidden.
"""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.parallel.random_kernels import is_kept


@triton.jit
def load_vector(VECTOR, columns, D):
    """A parameter, or another vector of D, as fp32."""
    return tl.load(VECTOR + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def dropped(values, token_draws, channel_draws, threshold, keep_scale):
    """`hash_dropout`; on the CPU draws are int64, whose lower half is the same."""
    draws = token_draws.to(tl.int32)[:, None] + channel_draws.to(tl.int32)[None, :]
    return tl.where(is_kept(draws, threshold), values * keep_scale, 0.0)


@triton.jit
def normalized(x, mean, rstd, WEIGHT, BIAS, columns, D, HAS_BIAS: tl.constexpr):
    """LayerNorm's output from its statistics."""
    y = (x - mean[:, None]) * rstd[:, None] * load_vector(WEIGHT, columns, D)[None, :]
    if HAS_BIAS:
        y += load_vector(BIAS, columns, D)[None, :]
    return y


@triton.jit
def fused_residual_norm_kernel(
    X,
    BRANCH,
    BRANCH_BIAS,
    TOKEN_DRAWS,
    CHANNEL_DRAWS,
    WEIGHT,
    BIAS,
    SUM,
    NORMED,
    MEAN,
    RSTD,
    SCALE,
    T,
    D,
    eps,
    threshold,
    keep_scale,
    format_largest,
    smallest_scale,
    HAS_BRANCH: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum x + dropout(branch + bias) and its LayerNorm; or only x's LayerNorm, or only the sum.

    SCALED: the norm is scaled to a format's largest number, and its scale is written, fp32 [1].

    Grid: tiles of tokens.
    """
    first = tl.program_id(0).to(tl.int64) * TOKENS
    tokens = tl.arange(0, TOKENS)
    columns = tl.arange(0, COLUMNS)
    inside = first + tokens < T
    offsets = tokens[:, None] * D + columns[None, :]
    mask = inside[:, None] & (columns < D)[None, :]
    x = tl.load(X + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(BRANCH + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_BRANCH_BIAS:
            branch += load_vector(BRANCH_BIAS, columns, D)[None, :]
        if DROPOUT:
            token_draws = tl.load(TOKEN_DRAWS + first + tokens, mask=inside, other=0)
            channel_draws = tl.load(CHANNEL_DRAWS + columns, mask=columns < D, other=0)
            branch = dropped(branch, token_draws, channel_draws, threshold, keep_scale)
        # The norm is that of the rounded sum that is kept, so that it is the same in backward.
        summed = (x + branch).to(SUM.dtype.element_ty)
        tl.store(SUM + first * D + offsets, summed, mask=mask)
        x = summed.to(tl.float32)
    if NORM:
        # Past the end of a row there are zeros.
        mean = tl.sum(x, 1) / D
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        normed = normalized(x, mean, rstd, WEIGHT, BIAS, columns, D, HAS_BIAS)
        if SCALED:
            # Of D numbers whose mean square is 1, none exceeds the root of D.
            largest = tl.sqrt(D * 1.0) * tl.max(tl.abs(load_vector(WEIGHT, columns, D)), 0)
            if HAS_BIAS:
                largest += tl.max(tl.abs(load_vector(BIAS, columns, D)), 0)
            scale = tl.maximum(largest / format_largest, smallest_scale)
            normed = normed * (1.0 / scale)
            if tl.program_id(0) == 0:
                tl.store(SCALE, scale)
        tl.store(NORMED + first * D + offsets, normed.to(NORMED.dtype.element_ty), mask=mask)
        tl.store(MEAN + first + tokens, mean, mask=inside)
        tl.store(RSTD + first + tokens, rstd, mask=inside)


@triton.jit
def fused_norm_again_kernel(
    X,
    MEAN,
    RSTD,
    WEIGHT,
    BIAS,
    NORMED,
    T,
    D,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """LayerNorm's output again, from its input and statistics.

    Grid: tiles of tokens.
    """
    first = tl.program_id(0).to(tl.int64) * TOKENS
    tokens = tl.arange(0, TOKENS)
    columns = tl.arange(0, COLUMNS)
    inside = first + tokens < T
    offsets = tokens[:, None] * D + columns[None, :]
    mask = inside[:, None] & (columns < D)[None, :]
    x = tl.load(X + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(MEAN + first + tokens, mask=inside, other=0.0)
    rstd = tl.load(RSTD + first + tokens, mask=inside, other=0.0)
    normed = normalized(x, mean, rstd, WEIGHT, BIAS, columns, D, HAS_BIAS)
    tl.store(NORMED + first * D + offsets, normed.to(NORMED.dtype.element_ty), mask=mask)


@triton.jit
def fused_residual_norm_gradient_kernel(
    NORMED_GRAD,
    SUM_GRAD,
    SUM,
    MEAN,
    RSTD,
    WEIGHT,
    TOKEN_DRAWS,
    CHANNEL_DRAWS,
    X_GRAD,
    BRANCH_GRAD,
    PARTS,
    T,
    D,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of x and of the branch, and parts of those of the norm's and branch's parameters.

    PARTS is fp32 [programs, sums, D]: for the norm's weight, its bias and the branch's bias, those
    that exist. Without dropout the branch's gradient is that of x, and not written.

    Grid: programs; each takes every `programs`-th tile of tokens.
    """
    columns = tl.arange(0, COLUMNS)
    tokens = tl.arange(0, TOKENS)
    offsets = tokens[:, None] * D + columns[None, :]
    weight = load_vector(WEIGHT, columns, D)[None, :]
    if DROPOUT:
        channel_draws = tl.load(CHANNEL_DRAWS + columns, mask=columns < D, other=0)
    weight_sum = tl.zeros([COLUMNS], tl.float32)
    bias_sum = tl.zeros([COLUMNS], tl.float32)
    branch_sum = tl.zeros([COLUMNS], tl.float32)
    tiles, programs = tl.cdiv(T, TOKENS), tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * TOKENS
        inside = first + tokens < T
        mask = inside[:, None] & (columns < D)[None, :]
        grad = tl.load(NORMED_GRAD + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(SUM + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + first + tokens, mask=inside, other=0.0)
        rstd = tl.load(RSTD + first + tokens, mask=inside, other=0.0)
        sum_grad = tl.load(SUM_GRAD + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        # Where nothing is loaded all gradients are 0, and so is what is added to sums.
        unit = (x - mean[:, None]) * rstd[:, None]
        weight_sum += tl.sum(grad * unit, 0)
        if HAS_BIAS:
            bias_sum += tl.sum(grad, 0)
        grad *= weight
        along, across = tl.sum(grad * unit, 1) / D, tl.sum(grad, 1) / D
        grad = (grad - unit * along[:, None] - across[:, None]) * rstd[:, None] + sum_grad
        tl.store(X_GRAD + first * D + offsets, grad.to(X_GRAD.dtype.element_ty), mask=mask)
        if DROPOUT:
            token_draws = tl.load(TOKEN_DRAWS + first + tokens, mask=inside, other=0)
            grad = dropped(grad, token_draws, channel_draws, threshold, keep_scale)
            branch_grad = grad.to(BRANCH_GRAD.dtype.element_ty)
            tl.store(BRANCH_GRAD + first * D + offsets, branch_grad, mask=mask)
        if HAS_BRANCH_BIAS:
            branch_sum += tl.sum(grad, 0)
    PARTS += tl.program_id(0) * (1 + HAS_BIAS + HAS_BRANCH_BIAS) * D
    tl.store(PARTS + columns, weight_sum, mask=columns < D)
    if HAS_BIAS:
        tl.store(PARTS + D + columns, bias_sum, mask=columns < D)
    if HAS_BRANCH_BIAS:
        tl.store(PARTS + (1 + HAS_BIAS) * D + columns, branch_sum, mask=columns < D)


@triton.jit
def fused_branch_gradient_kernel(
    SUM_GRAD,
    TOKEN_DRAWS,
    CHANNEL_DRAWS,
    BRANCH_GRAD,
    PARTS,
    T,
    D,
    threshold,
    keep_scale,
    HAS_BRANCH_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The branch's gradient where no norm follows, and parts of its bias's, fp32 [programs, D].

    Grid: programs; each takes every `programs`-th tile of tokens.
    """
    columns = tl.arange(0, COLUMNS)
    tokens = tl.arange(0, TOKENS)
    offsets = tokens[:, None] * D + columns[None, :]
    if DROPOUT:
        channel_draws = tl.load(CHANNEL_DRAWS + columns, mask=columns < D, other=0)
    branch_sum = tl.zeros([COLUMNS], tl.float32)
    tiles, programs = tl.cdiv(T, TOKENS), tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * TOKENS
        inside = first + tokens < T
        mask = inside[:, None] & (columns < D)[None, :]
        grad = tl.load(SUM_GRAD + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            token_draws = tl.load(TOKEN_DRAWS + first + tokens, mask=inside, other=0)
            grad = dropped(grad, token_draws, channel_draws, threshold, keep_scale)
            branch_grad = grad.to(BRANCH_GRAD.dtype.element_ty)
            tl.store(BRANCH_GRAD + first * D + offsets, branch_grad, mask=mask)
        if HAS_BRANCH_BIAS:
            branch_sum += tl.sum(grad, 0)
    if HAS_BRANCH_BIAS:
        tl.store(PARTS + tl.program_id(0) * D + columns, branch_sum, mask=columns < D)
