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


def mix32(x: Tensor) -> Tensor:
    """Hash 32-bit numbers, held in int64, onto 32-bit numbers, one to one.

    A two-round xorshift-multiply finaliser whose multipliers were found by the hash-prospector
    search. Both are below 2^31, so that products stay inside int64: no overflow is relied on.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK_32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK_32
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


def hash_dropout(
    x: Tensor, probability: float, keys_N: Tensor, first_element: int | Tensor = 0
) -> Tensor:
    """Zero elements with `probability` and scale up the rest.

    The mask is a function of the row's key and of the element's number within the row, so it is
    the same whatever batch, rank or order the row is computed in.

    Args:
        x: [N, ...]: each of the N is a row, or a part of one, its elements along the remaining
            dimensions.
        probability: in [0, 1).
        keys_N: int64 [N] from `dropout_keys`, that of the row.
        first_element: number of the first element within the whole row, one for all or int64
            [N]; at most 2^32 elements a row.
    """
    if probability == 0.0:
        return x
    count = math.prod(x.shape[1:])
    ones = (1,) * (x.dim() - 1)
    element = torch.arange(count, device=x.device, dtype=torch.int64).view(1, *x.shape[1:])
    if isinstance(first_element, Tensor):
        first_element = first_element.view(-1, *ones)
    element = element + first_element
    key = keys_N.view(-1, *ones)
    # An odd multiplier and an offset from the key keep two rows' masks from being shifted copies
    # of one another, as they would be if the key were only added to the counter.
    draw = mix32(((element * ((key >> 1) | 1)) & _MASK_32) ^ mix32(key ^ 0x5BD1E995))
    keep = draw >= round(probability * 2**32)
    return torch.where(keep, x * (1.0 / (1.0 - probability)), 0.0)


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
