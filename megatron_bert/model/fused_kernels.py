"""Triton kernels for what stands between a block's matrix products.

Each reads what it needs once and sums while it writes: gradients of parameters are column sums over
all tokens, and those of a program's own tokens are added up in fp32 beside the gradients that it
writes. Programs write their sums one below another, so that no sum depends on which one finishes
first, and how many programs there are follows from shapes alone.

Arrays are dense: [T, D], [T, F], or [T, 2 F] of gate's features and then up's. Statistics are fp32
[T], draws are as `hash_dropout` takes them.

Shape suffixes: T tokens, D hidden, F feed-forward.
"""

# Types are Triton's own, of values that stand on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.model.flash_kernels import is_kept


@triton.jit
def _load_vector(VECTOR, columns, D):
    """A parameter, or another vector of D, as fp32."""
    return tl.load(VECTOR + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _dropped(values, token_draws, channel_draws, threshold, keep_scale):
    """`hash_dropout`; draws are int64 on the CPU, whose lower half is the same."""
    draws = token_draws.to(tl.int32)[:, None] + channel_draws.to(tl.int32)[None, :]
    return tl.where(is_kept(draws, threshold), values * keep_scale, 0.0)


@triton.jit
def _normalized(x, mean, rstd, WEIGHT, BIAS, columns, D, HAS_BIAS: tl.constexpr):
    """LayerNorm's output from its statistics."""
    y = (x - mean[:, None]) * rstd[:, None] * _load_vector(WEIGHT, columns, D)[None, :]
    if HAS_BIAS:
        y += _load_vector(BIAS, columns, D)[None, :]
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
    """The sum x + dropout(branch + bias) and its LayerNorm; without a branch x's, or but the sum.

    SCALED: the norm is scaled to a format's largest number, and its scale written, fp32 [1].

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
            branch += _load_vector(BRANCH_BIAS, columns, D)[None, :]
        if DROPOUT:
            token_draws = tl.load(TOKEN_DRAWS + first + tokens, mask=inside, other=0)
            channel_draws = tl.load(CHANNEL_DRAWS + columns, mask=columns < D, other=0)
            branch = _dropped(branch, token_draws, channel_draws, threshold, keep_scale)
        # The norm is that of what is kept, so that backward it is the same one.
        summed = (x + branch).to(SUM.dtype.element_ty)
        tl.store(SUM + first * D + offsets, summed, mask=mask)
        x = summed.to(tl.float32)
    if NORM:
        # Past the end of a row there are zeros.
        mean = tl.sum(x, 1) / D
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        normed = _normalized(x, mean, rstd, WEIGHT, BIAS, columns, D, HAS_BIAS)
        if SCALED:
            # Of D numbers whose squares' mean is 1 none passes the root of D.
            largest = tl.sqrt(D * 1.0) * tl.max(tl.abs(_load_vector(WEIGHT, columns, D)), 0)
            if HAS_BIAS:
                largest += tl.max(tl.abs(_load_vector(BIAS, columns, D)), 0)
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
    normed = _normalized(x, mean, rstd, WEIGHT, BIAS, columns, D, HAS_BIAS)
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

    PARTS is fp32 [programs, sums, D]: of the norm's weight, its bias, the branch's bias, those that
    there are. Without dropout the branch's gradient is that of x, and not written.

    Grid: programs, each takes every so many-th tile of tokens.
    """
    columns = tl.arange(0, COLUMNS)
    tokens = tl.arange(0, TOKENS)
    offsets = tokens[:, None] * D + columns[None, :]
    weight = _load_vector(WEIGHT, columns, D)[None, :]
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
            grad = _dropped(grad, token_draws, channel_draws, threshold, keep_scale)
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

    Grid: programs, each takes every so many-th tile of tokens.
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
            grad = _dropped(grad, token_draws, channel_draws, threshold, keep_scale)
            branch_grad = grad.to(BRANCH_GRAD.dtype.element_ty)
            tl.store(BRANCH_GRAD + first * D + offsets, branch_grad, mask=mask)
        if HAS_BRANCH_BIAS:
            branch_sum += tl.sum(grad, 0)
    if HAS_BRANCH_BIAS:
        tl.store(PARTS + tl.program_id(0) * D + columns, branch_sum, mask=columns < D)


@triton.jit
def _activated(gate, GELU: tl.constexpr):
    """Silu, or gelu by the error function, and its derivative."""
    if GELU:
        # sqrt(1 / 2), and sqrt(1 / (2 pi)).
        share = 0.5 + 0.5 * tl.math.erf(gate * 0.7071067811865476)
        slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    else:
        share = tl.sigmoid(gate)
        slope = share * (1.0 + gate * (1.0 - share))
    return gate * share, slope


@triton.jit
def fused_gated_activation_kernel(
    GATE_UP,
    GATE_BIAS,
    UP_BIAS,
    OUT,
    T,
    F,
    BIASES: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """activation(gate + bias) * (up + bias).

    Grid: tiles of tokens * tiles of columns.
    """
    tiles = tl.cdiv(F, COLUMNS)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * TOKENS
    tokens = tl.arange(0, TOKENS)
    mask = (first + tokens < T)[:, None] & (columns < F)[None, :]
    wide = tokens[:, None] * 2 * F + columns[None, :]
    gate = tl.load(GATE_UP + first * 2 * F + wide, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + first * 2 * F + F + wide, mask=mask, other=0.0).to(tl.float32)
    if BIASES:
        gate += _load_vector(GATE_BIAS, columns, F)[None, :]
        up += _load_vector(UP_BIAS, columns, F)[None, :]
    out = _activated(gate, GELU)[0] * up
    offsets = tokens[:, None] * F + columns[None, :]
    tl.store(OUT + first * F + offsets, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def fused_gated_activation_gradient_kernel(
    GRAD,
    GATE_UP,
    GATE_BIAS,
    UP_BIAS,
    GATE_UP_GRAD,
    OUT,
    PARTS,
    T,
    F,
    BIASES: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of gate and up, the activation again, and parts of the biases' gradients.

    PARTS is fp32 [programs a tile of columns, 2, F]: of gate's bias and up's.

    Grid: programs * tiles of columns; each program takes every so many-th tile of tokens.
    """
    tiles = tl.cdiv(F, COLUMNS)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    program, programs = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    tokens = tl.arange(0, TOKENS)
    offsets = tokens[:, None] * F + columns[None, :]
    wide = tokens[:, None] * 2 * F + columns[None, :]
    if BIASES:
        gate_bias = _load_vector(GATE_BIAS, columns, F)[None, :]
        up_bias = _load_vector(UP_BIAS, columns, F)[None, :]
    gate_sum = tl.zeros([TOKENS, COLUMNS], tl.float32)
    up_sum = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for tile in tl.range(program, tl.cdiv(T, TOKENS), programs, num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * TOKENS
        mask = (first + tokens < T)[:, None] & (columns < F)[None, :]
        grad = tl.load(GRAD + first * F + offsets, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(GATE_UP + first * 2 * F + wide, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(GATE_UP + first * 2 * F + F + wide, mask=mask, other=0.0).to(tl.float32)
        if BIASES:
            gate += gate_bias
            up += up_bias
        active, slope = _activated(gate, GELU)
        gate_grad, up_grad = grad * up * slope, grad * active
        out = (active * up).to(OUT.dtype.element_ty)
        tl.store(OUT + first * F + offsets, out, mask=mask)
        compute = GATE_UP_GRAD.dtype.element_ty
        tl.store(GATE_UP_GRAD + first * 2 * F + wide, gate_grad.to(compute), mask=mask)
        tl.store(GATE_UP_GRAD + first * 2 * F + F + wide, up_grad.to(compute), mask=mask)
        if BIASES:
            gate_sum += gate_grad
            up_sum += up_grad
    if BIASES:
        PARTS += program * 2 * F
        tl.store(PARTS + columns, tl.sum(gate_sum, 0), mask=columns < F)
        tl.store(PARTS + F + columns, tl.sum(up_sum, 0), mask=columns < F)
