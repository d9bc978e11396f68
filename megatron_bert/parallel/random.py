"""Randomness as a function: counter-based hashes in place of generators.

Whatever is drawn depends on what it is for (seed, name, row, position, ...) and on nothing else,
so that every layout, restart and device draws the same, there is no state to save, and the ops
compile without a graph break.

Shape suffixes: B rows, S slots of a row, D hidden.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_SIGN_BIT = 0x80000000

# Multipliers below 2^31, so that products with 32-bit numbers stay inside int64.
FIRST_FACTOR = 0x21F0AAAD
SECOND_FACTOR = 0x735A2D97
# Keep the hashes of rows and elements from meeting at 0, which `mix32` maps onto itself.
ROW_OFFSET = 0x5BD1E995
GROUP_OFFSET = 0x85EBCA6B
ELEMENT_OFFSET = 0x9E3779B9

# Elements per group. An element is hashed by its place within its group and by the group's number,
# so that a kernel that takes one group at a time has the same hashes of places for every group.
GROUP = 64


def mix32(x: Tensor) -> Tensor:
    """Hash 32-bit numbers, held in int64, onto 32-bit numbers, one to one.

    A two-round xorshift-multiply finaliser whose multipliers were found by the hash-prospector
    search; no overflow is relied on.
    """
    x = ((x ^ (x >> 16)) * FIRST_FACTOR) & _MASK_32
    x = ((x ^ (x >> 15)) * SECOND_FACTOR) & _MASK_32
    return x ^ (x >> 15)


def key32(*parts: object) -> int:
    """Derive a 32-bit key from a seed and names, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def dropout_keys(rows_B: Tensor, seed: int, site: str, layers: range) -> Tensor:
    """Make one dropout key per (layer, row).

    Args:
        rows_B: int64 [B], global row numbers.
        seed: the run's seed.
        site: what the keys are for; sites draw independently.
        layers: L numbers of layers within the whole model.

    Returns:
        int64 [L, B], each below 2^32.
    """
    layer_L = torch.arange(layers.start, layers.stop, device=rows_B.device, dtype=torch.int64)
    layer_L = mix32(layer_L ^ key32(seed, site))
    # Rows may outgrow 32 bits: the high half is hashed in, not cut off.
    row_B = mix32(mix32(rows_B & _MASK_32) ^ ((rows_B >> 32) & _MASK_32))
    return mix32(row_B[None, :] ^ layer_L[:, None])


def vector_draws(keys: Tensor, numbers: Tensor) -> Tensor:
    """Hash each vector that elements are to be dropped from: the first half of a dropout mask.

    Args:
        keys: int64, from `dropout_keys`, the key of the vector's row; broadcast against `numbers`.
        numbers: int64, below 2^32, the vector's number within its row.

    Returns:
        The hashes, as `hash_dropout` takes them: int64, on CUDA the same 32 bits as int32.
    """
    # An odd multiplier and an offset from the key keep two rows' masks from being shifted copies
    # of one another, as they would be if the key were only added to the counter.
    draws = mix32(((numbers * ((keys >> 1) | 1)) & _MASK_32) ^ mix32(keys ^ ROW_OFFSET))
    return _as_device_words(draws)


def element_draws(count: int, device: torch.device) -> Tensor:
    """Hash the numbers of a vector's elements, [count]: the other half, alike for all vectors.

    Among four elements at two places in two groups, three determine the fourth by a rule that is
    the same for all vectors: any two or three elements are dropped independently, such sets of four
    only on average over all of them. (The same holds for two elements of each of two vectors.)
    """
    numbers = torch.arange(count, device=device, dtype=torch.int64)
    members = mix32((numbers % GROUP) ^ ELEMENT_OFFSET)
    groups = mix32((numbers // GROUP) ^ GROUP_OFFSET)
    return _as_device_words((members + groups) & _MASK_32)


def hash_dropout(
    x: Tensor, probability: float, vector_draws: Tensor, element_draws: Tensor
) -> Tensor:
    """Zero elements with `probability` and scale up the rest.

    The mask is a function of the row's key, of the vector's number within the row and of the
    element's within the vector, so it is the same whatever batch, rank or order the vector is
    computed in. The two hashes are made once; for each element they are added and the sum is
    squared, modulo 2^32. Squaring makes elements unrelated whose hashes lie a fixed distance apart,
    as those of two vectors do; multiplying by a constant would not.

    Args:
        x: [..., C], vectors along the last dimension.
        probability: in [0, 1).
        vector_draws: [...], the shape of x without C.
        element_draws: [C].
    """
    if probability == 0.0:
        return x
    threshold = keep_threshold(probability)
    draws = vector_draws[..., None] + element_draws
    if draws.dtype == torch.int64:
        # Without the highest bit, which does not reach the square's lower half, nothing overflows.
        draws = draws & (_SIGN_BIT - 1)
        keep = ((draws * draws) & _MASK_32 ^ _SIGN_BIT) - _SIGN_BIT >= threshold
    else:
        # CUDA's 32-bit integers wrap, and its 64-bit ones cost several times as much.
        keep = draws * draws >= threshold
    return torch.where(keep, x * (1.0 / (1.0 - probability)), 0.0)


def keep_threshold(probability: float) -> int:
    """The smallest draw, as a signed 32-bit number, for which an element is kept."""
    return min(round(probability * 2**32), _MASK_32) - _SIGN_BIT


def _as_device_words(draws: Tensor) -> Tensor:
    return draws.to(torch.int32) if draws.is_cuda else draws


@torch.no_grad()
def fill_normal(
    shard: Tensor,
    *,
    global_shape: Sequence[int],
    offset: Sequence[int],
    std: float,
    seed: int,
    name: str,
) -> None:
    """Fill a shard of a parameter with N(0, std^2), each element a hash of its global number.

    Box-Muller in float64, rounded once to the shard's type, so that CPU and CUDA, vector body
    and loop tail agree.

    Args:
        shard: the local part, of any shape, filled in place.
        global_shape: shape of the whole parameter; fewer than 2^32 elements.
        offset: position of the shard's first element in the whole, per dimension.
        std: standard deviation.
        seed: the run's seed.
        name: the parameter's fully-qualified name.
    """
    assert math.prod(global_shape) <= 2**32, f"{name} has more than 2^32 elements"
    key_a, key_b = key32(seed, name, "radius"), key32(seed, name, "angle")
    rows_per_chunk = max(1, 2**22 // max(1, math.prod(shard.shape[1:])))
    for start in range(0, shard.shape[0] if shard.numel() else 0, rows_per_chunk):
        chunk = shard[start : start + rows_per_chunk]
        element = torch.zeros((), dtype=torch.int64, device=shard.device)
        for dim, (length, first) in enumerate(zip(chunk.shape, offset, strict=True)):
            index = torch.arange(length, dtype=torch.int64, device=shard.device) + first
            if dim == 0:
                index = index + start
            stride = math.prod(global_shape[dim + 1 :])
            element = element.unsqueeze(-1) + index * stride
        radius = (mix32(mix32(element ^ key_a) ^ key_b).double() + 0.5) / 2**32
        angle = mix32(mix32(element ^ key_b) ^ key_a).double() * (2.0 * math.pi / 2**32)
        chunk.copy_((-2.0 * radius.log()).sqrt() * angle.cos() * std)
