"""Triton kernels that write what lies between a block's FP8 products.

Products of FP8 numbers read both operands along the dimension they sum over, which for a weight's
gradient is the tokens. So a kernel writes an array's rows, its columns as rows, or both, from one
reading. Columns are written four tokens' numbers at a time, packed in 32 bits: 8-bit numbers would
change places one by one. Hence tokens come in fours.

An array's scale is the factor that turns its numbers back into the values they stand for. It
follows from a bound that is known before the array is written; only the activation is scaled row by
row, by each row's largest number as it is written. Scales are fp32 of one element, or [T], one for
each row. Arrays are dense.

Shape suffixes: T tokens, D hidden, F feed-forward.
"""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.model.fused_activation_kernels import activated
from megatron_bert.model.fused_norm_kernels import dropped, load_vector, normalized

_WORDS = """{{
    .reg .b16 low, high;
    cvt.rn.satfinite.{made}x2.f32 low, $2, $1;
    cvt.rn.satfinite.{made}x2.f32 high, $4, $3;
    mov.b32 $0, {{low, high}};
}}"""
_TO_E4M3 = tl.constexpr(_WORDS.format(made="e4m3"))
_TO_E5M2 = tl.constexpr(_WORDS.format(made="e5m2"))


@triton.jit
def _packed(a, b, c, d, inverse, FORMAT: tl.constexpr):
    """Pack four numbers times `inverse` as FP8, the first in the lowest bits.

    Numbers beyond the format's range become its largest number.

    In assembly: Triton (3.6) loses numbers of E5M2 that are put together as integers.
    """
    return tl.inline_asm_elementwise(
        _TO_E5M2 if FORMAT == tl.float8e5 else _TO_E4M3,  # noqa: SIM300
        "=r,f,f,f,f",
        [a * inverse, b * inverse, c * inverse, d * inverse],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _store_columns(OUT, packed, first, fours, columns, column_length, mask):
    """Write packed numbers, [fours, columns], to columns of `column_length` numbers each."""
    offsets = columns.to(tl.int64)[None, :] * (column_length // 4) + first // 4 + fours[:, None]
    tl.store(OUT + offsets, packed, mask=mask)


@triton.jit
def _cast_tokens(
    X,
    TOKEN_DRAWS,
    channel_draws,
    NUMBERS,
    first,
    tokens,
    columns,
    mask,
    T,
    D,
    inverse,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """Values of a tile's tokens after dropout; with HAS_ROWS also written as rows of FP8."""
    offsets = first * D + tokens[:, None] * D + columns[None, :]
    x = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        token_draws = tl.load(TOKEN_DRAWS + first + tokens, mask=first + tokens < T, other=0)
        x = dropped(x, token_draws, channel_draws, threshold, keep_scale)
    if HAS_ROWS:
        tl.store(NUMBERS + offsets, (x * inverse).to(NUMBERS.dtype.element_ty), mask=mask)
    return x


@triton.jit
def fp8_cast_kernel(
    X,
    SCALE,
    TOKEN_DRAWS,
    CHANNEL_DRAWS,
    NUMBERS,
    COLUMNS_PACKED,
    PARTS,
    T,
    D,
    column_length,
    threshold,
    keep_scale,
    FORMAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """FP8 of dropout(x), its columns as rows, or both; parts of column sums, fp32 [programs, D].

    The columns may be stretches of longer ones, of `column_length` numbers.

    Grid: programs * tiles of columns; each program takes every `programs`-th tile of tokens.
    """
    tiles = tl.cdiv(D, COLUMNS)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    program, programs = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    fours = tl.arange(0, TOKENS // 4)
    inverse = 1.0 / tl.load(SCALE)
    draws = columns
    if DROPOUT:
        draws = tl.load(CHANNEL_DRAWS + columns, mask=columns < D, other=0)
    total = tl.zeros([TOKENS // 4, COLUMNS], tl.float32)
    for tile in tl.range(program, tl.cdiv(T, TOKENS), programs, num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * TOKENS
        mask = (first // 4 + fours < T // 4)[:, None] & (columns < D)[None, :]
        a = _cast_tokens(
            X, TOKEN_DRAWS, draws, NUMBERS, first, 4 * fours, columns, mask, T, D, inverse,
            threshold, keep_scale, DROPOUT, HAS_ROWS,
        )  # fmt: skip
        b = _cast_tokens(
            X, TOKEN_DRAWS, draws, NUMBERS, first, 4 * fours + 1, columns, mask, T, D, inverse,
            threshold, keep_scale, DROPOUT, HAS_ROWS,
        )  # fmt: skip
        c = _cast_tokens(
            X, TOKEN_DRAWS, draws, NUMBERS, first, 4 * fours + 2, columns, mask, T, D, inverse,
            threshold, keep_scale, DROPOUT, HAS_ROWS,
        )  # fmt: skip
        d = _cast_tokens(
            X, TOKEN_DRAWS, draws, NUMBERS, first, 4 * fours + 3, columns, mask, T, D, inverse,
            threshold, keep_scale, DROPOUT, HAS_ROWS,
        )  # fmt: skip
        if SUMS:
            total += (a + b) + (c + d)
        if HAS_COLUMNS:
            packed = _packed(a, b, c, d, inverse, FORMAT)
            _store_columns(COLUMNS_PACKED, packed, first, fours, columns, column_length, mask)
    if SUMS:
        tl.store(PARTS + program * D + columns, tl.sum(total, 0), mask=columns < D)


@triton.jit
def _normed_tokens(
    X, MEAN, RSTD, WEIGHT, BIAS, first, tokens, columns, mask, T, D, HAS_BIAS: tl.constexpr
):
    """LayerNorm's output of a tile's tokens."""
    offsets = first * D + tokens[:, None] * D + columns[None, :]
    x = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(MEAN + first + tokens, mask=first + tokens < T, other=0.0)
    rstd = tl.load(RSTD + first + tokens, mask=first + tokens < T, other=0.0)
    return normalized(x, mean, rstd, WEIGHT, BIAS, columns, D, HAS_BIAS)


@triton.jit
def fp8_norm_columns_kernel(
    X,
    MEAN,
    RSTD,
    WEIGHT,
    BIAS,
    SCALE,
    COLUMNS_PACKED,
    T,
    D,
    FORMAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """FP8 of LayerNorm's output, its columns as rows, from its input and statistics.

    Grid: tiles of tokens * tiles of columns.
    """
    tiles = tl.cdiv(D, COLUMNS)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * TOKENS
    fours = tl.arange(0, TOKENS // 4)
    mask = (first // 4 + fours < T // 4)[:, None] & (columns < D)[None, :]
    inverse = 1.0 / tl.load(SCALE)
    a = _normed_tokens(X, MEAN, RSTD, WEIGHT, BIAS, first, 4 * fours, columns, mask, T, D, HAS_BIAS)
    b = _normed_tokens(
        X, MEAN, RSTD, WEIGHT, BIAS, first, 4 * fours + 1, columns, mask, T, D, HAS_BIAS
    )
    c = _normed_tokens(
        X, MEAN, RSTD, WEIGHT, BIAS, first, 4 * fours + 2, columns, mask, T, D, HAS_BIAS
    )
    d = _normed_tokens(
        X, MEAN, RSTD, WEIGHT, BIAS, first, 4 * fours + 3, columns, mask, T, D, HAS_BIAS
    )
    packed = _packed(a, b, c, d, inverse, FORMAT)
    _store_columns(COLUMNS_PACKED, packed, first, fours, columns, T, mask)


@triton.jit
def fp8_gated_activation_kernel(
    GATE_UP,
    GATE_BIAS,
    UP_BIAS,
    NUMBERS,
    SCALES,
    LARGEST,
    T,
    F,
    format_largest,
    smallest_scale,
    BIASES: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """FP8 of activation(gate + bias) * (up + bias), each row scaled by its own largest number.

    SCALES is [T]; LARGEST, [T], the largest number that a row of gate or up has with its bias.

    Grid: tiles of tokens; whole rows.
    """
    columns = tl.arange(0, COLUMNS)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    tokens = tl.arange(0, TOKENS)
    inside = first + tokens < T
    mask = inside[:, None] & (columns < F)[None, :]
    wide = tokens[:, None] * 2 * F + columns[None, :]
    gate = tl.load(GATE_UP + first * 2 * F + wide, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + first * 2 * F + F + wide, mask=mask, other=0.0).to(tl.float32)
    if BIASES:
        gate += load_vector(GATE_BIAS, columns, F)[None, :]
        up += load_vector(UP_BIAS, columns, F)[None, :]
    largest = tl.maximum(tl.max(tl.abs(gate), 1), tl.max(tl.abs(up), 1))
    out = activated(gate, GELU)[0] * up
    scale = tl.maximum(tl.max(tl.abs(out), 1) / format_largest, smallest_scale)
    out = out * (1.0 / scale)[:, None]
    offsets = tokens[:, None] * F + columns[None, :]
    tl.store(NUMBERS + first * F + offsets, out.to(NUMBERS.dtype.element_ty), mask=mask)
    tl.store(SCALES + first + tokens, scale, mask=inside)
    tl.store(LARGEST + first + tokens, largest, mask=inside)


@triton.jit
def _activation_gradients(
    GRAD,
    GATE_UP,
    gate_bias,
    up_bias,
    GRAD_NUMBERS,
    first,
    tokens,
    columns,
    mask,
    F,
    grad_inverse,
    BIASES: tl.constexpr,
    GELU: tl.constexpr,
):
    """A tile's activation and gate's and up's gradients; the gradients are written as rows."""
    offsets = first * F + tokens[:, None] * F + columns[None, :]
    wide = first * 2 * F + tokens[:, None] * 2 * F + columns[None, :]
    grad = tl.load(GRAD + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE_UP + wide, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + F + wide, mask=mask, other=0.0).to(tl.float32)
    if BIASES:
        gate += gate_bias
        up += up_bias
    active, slope = activated(gate, GELU)
    gate_grad, up_grad = grad * up * slope, grad * active
    made = GRAD_NUMBERS.dtype.element_ty
    tl.store(GRAD_NUMBERS + wide, (gate_grad * grad_inverse).to(made), mask=mask)
    tl.store(GRAD_NUMBERS + F + wide, (up_grad * grad_inverse).to(made), mask=mask)
    return active * up, gate_grad, up_grad


@triton.jit
def fp8_gated_activation_gradient_kernel(
    GRAD,
    GATE_UP,
    GATE_BIAS,
    UP_BIAS,
    GRAD_SCALE,
    SCALE,
    GRAD_NUMBERS,
    GRAD_COLUMNS_PACKED,
    COLUMNS_PACKED,
    PARTS,
    T,
    F,
    FORMAT: tl.constexpr,
    GRAD_FORMAT: tl.constexpr,
    BIASES: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """FP8 of gate's and up's gradients, [T, 2 F] and [2 F, T], and of the activation, [F, T].

    PARTS, of the biases' gradients, is fp32 [programs per tile of columns, 2, F].

    Grid: programs * tiles of columns; each program takes every `programs`-th tile of tokens.
    """
    tiles = tl.cdiv(F, COLUMNS)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    program, programs = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    fours = tl.arange(0, TOKENS // 4)
    inverse, grad_inverse = 1.0 / tl.load(SCALE), 1.0 / tl.load(GRAD_SCALE)
    gate_bias = 0.0
    up_bias = 0.0
    if BIASES:
        gate_bias = load_vector(GATE_BIAS, columns, F)[None, :]
        up_bias = load_vector(UP_BIAS, columns, F)[None, :]
    gate_sum = tl.zeros([TOKENS // 4, COLUMNS], tl.float32)
    up_sum = tl.zeros([TOKENS // 4, COLUMNS], tl.float32)
    for tile in tl.range(program, tl.cdiv(T, TOKENS), programs, num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * TOKENS
        mask = (first // 4 + fours < T // 4)[:, None] & (columns < F)[None, :]
        a, gate_a, up_a = _activation_gradients(
            GRAD, GATE_UP, gate_bias, up_bias, GRAD_NUMBERS, first, 4 * fours, columns, mask, F,
            grad_inverse, BIASES, GELU,
        )  # fmt: skip
        b, gate_b, up_b = _activation_gradients(
            GRAD, GATE_UP, gate_bias, up_bias, GRAD_NUMBERS, first, 4 * fours + 1, columns, mask, F,
            grad_inverse, BIASES, GELU,
        )  # fmt: skip
        c, gate_c, up_c = _activation_gradients(
            GRAD, GATE_UP, gate_bias, up_bias, GRAD_NUMBERS, first, 4 * fours + 2, columns, mask, F,
            grad_inverse, BIASES, GELU,
        )  # fmt: skip
        d, gate_d, up_d = _activation_gradients(
            GRAD, GATE_UP, gate_bias, up_bias, GRAD_NUMBERS, first, 4 * fours + 3, columns, mask, F,
            grad_inverse, BIASES, GELU,
        )  # fmt: skip
        if BIASES:
            gate_sum += (gate_a + gate_b) + (gate_c + gate_d)
            up_sum += (up_a + up_b) + (up_c + up_d)
        packed = _packed(a, b, c, d, inverse, FORMAT)
        _store_columns(COLUMNS_PACKED, packed, first, fours, columns, T, mask)
        packed = _packed(gate_a, gate_b, gate_c, gate_d, grad_inverse, GRAD_FORMAT)
        _store_columns(GRAD_COLUMNS_PACKED, packed, first, fours, columns, T, mask)
        packed = _packed(up_a, up_b, up_c, up_d, grad_inverse, GRAD_FORMAT)
        _store_columns(GRAD_COLUMNS_PACKED, packed, first, fours, columns + F, T, mask)
    if BIASES:
        PARTS += program * 2 * F
        tl.store(PARTS + columns, tl.sum(gate_sum, 0), mask=columns < F)
        tl.store(PARTS + F + columns, tl.sum(up_sum, 0), mask=columns < F)
