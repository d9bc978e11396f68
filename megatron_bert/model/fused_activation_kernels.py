"""Triton kernels of the gated activation; they sum biases' gradients as `fused_norm_kernels` do.

Arrays are dense: [T, F], or [T, 2 F] of gate's features and then up's.

Shape suffixes: T tokens, F feed-forward.
"""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.model.fused_norm_kernels import load_vector


@triton.jit
def activated(gate, GELU: tl.constexpr):
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
        gate += load_vector(GATE_BIAS, columns, F)[None, :]
        up += load_vector(UP_BIAS, columns, F)[None, :]
    out = activated(gate, GELU)[0] * up
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

    PARTS is fp32 [programs per tile of columns, 2, F]: for gate's bias and up's.

    Grid: programs * tiles of columns; each program takes every `programs`-th tile of tokens.
    """
    tiles = tl.cdiv(F, COLUMNS)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    program, programs = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    tokens = tl.arange(0, TOKENS)
    offsets = tokens[:, None] * F + columns[None, :]
    wide = tokens[:, None] * 2 * F + columns[None, :]
    if BIASES:
        gate_bias = load_vector(GATE_BIAS, columns, F)[None, :]
        up_bias = load_vector(UP_BIAS, columns, F)[None, :]
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
        active, slope = activated(gate, GELU)
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
