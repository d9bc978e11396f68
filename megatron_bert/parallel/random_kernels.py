"""The hashes of `parallel.random` in Triton, for kernels that draw by themselves."""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_bert.parallel import random

_FIRST_FACTOR = tl.constexpr(random.FIRST_FACTOR)
_SECOND_FACTOR = tl.constexpr(random.SECOND_FACTOR)
_ROW_OFFSET = tl.constexpr(random.ROW_OFFSET)
GROUP = tl.constexpr(random.GROUP)
_GROUP_OFFSET = tl.constexpr(random.GROUP_OFFSET)
_ELEMENT_OFFSET = tl.constexpr(random.ELEMENT_OFFSET)


@triton.jit
def mix(x):
    """`mix32`."""
    x = (x ^ (x >> 16)) * _FIRST_FACTOR
    x = (x ^ (x >> 15)) * _SECOND_FACTOR
    return x ^ (x >> 15)


@triton.jit
def vector_draws(key, numbers):
    """`vector_draws` of query slots, as int32."""
    draws = mix((numbers.to(tl.uint32) * ((key >> 1) | 1)) ^ mix(key ^ _ROW_OFFSET))
    return draws.to(tl.int32, bitcast=True)


@triton.jit
def group_draws(numbers):
    """What `element_draws` adds for the group of elements that these are in, as int32."""
    draws = mix(tl.cast(numbers // GROUP, tl.uint32) ^ _GROUP_OFFSET)
    return draws.to(tl.int32, bitcast=True)


@triton.jit
def member_draws(numbers):
    """What `element_draws` adds for their places within the group, as int32."""
    return mix((numbers % GROUP).to(tl.uint32) ^ _ELEMENT_OFFSET).to(tl.int32, bitcast=True)


@triton.jit
def is_kept(draws, threshold):
    """Which elements `hash_dropout` keeps, given the sums of their draws."""
    return draws * draws >= threshold
