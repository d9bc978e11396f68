"""The tiles of `flash_attention`: how large they are, which see each other, and their draws.

Shape suffixes: S slots, K head size.
"""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from megatron_bert.model.fused_tiles import launch_options
from megatron_bert.parallel.random_kernels import GROUP, group_draws, member_draws


@dataclass(frozen=True)
class AttentionTile:
    """How a kernel of attention is tiled.

    Attributes:
        queries: queries per tile.
        keys: keys per tile.
        warps: warps that share a tile.
        stages: pipeline stages of tiles that are loaded ahead.
        registers: most registers per thread, so that more programs share a multiprocessor; None
            leaves that to the compiler.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """The keyword arguments of a kernel's launch."""
        sizes = {"QUERIES": self.queries, "KEYS": self.keys, "num_stages": self.stages}
        return sizes | launch_options(self.warps, self.registers)

    def of_heads(self, size: int) -> AttentionTile:
        """The tile for heads of `size` channels; it was tuned for heads of at most 64."""
        return self if size <= 64 else replace(self, warps=8, stages=2, registers=None)


@dataclass(frozen=True)
class AttentionTiling:
    """The tile of each kernel of attention, the quickest on an H100 with heads of 64 channels.

    Attributes:
        forward: tile of the forward kernel.
        query_gradient: tile of the queries' gradient.
        key_gradient: tile of the keys' and values' gradient.
        key_gradient_programs: the fewest programs that the last kernel should have where heads
            share keys: nearly eight for each of an H100's 132 multiprocessors, of which two run at
            once. (With half as many it took a tenth longer on rows of 512 slots.)
    """

    forward: AttentionTile = AttentionTile(64, 64, 4, 3, 128)
    query_gradient: AttentionTile = AttentionTile(64, 64, 4, 3)
    key_gradient: AttentionTile = AttentionTile(64, 64, 4, 3)
    key_gradient_programs: int = 1024


ATTENTION_TILING = AttentionTiling()


@triton.jit
def pair_draws(draws, members, first, KEYS: tl.constexpr):
    """Sums of queries' and keys' draws for a tile of keys; `members` are those of the first tile.

    If a tile is a group, all tiles have the same members; the group's draw is added to the queries.
    """
    if KEYS == GROUP:
        return (draws + group_draws(first))[:, None] + members[None, :]
    keys = first + tl.arange(0, KEYS)
    return draws[:, None] + (group_draws(keys) + member_draws(keys))[None, :]


@triton.jit
def sees(slots, begins, ends, others, REACH: tl.constexpr):
    """Which of the other slots share segment and window with slots; both broadcast."""
    visible = (others >= begins) & (others < ends)
    if REACH >= 0:
        distance = slots - others
        visible = visible & (distance <= REACH) & (distance >= -REACH)
    return visible


@triton.jit
def ranges(
    BEGINS, ENDS, row, first, S, SIZE: tl.constexpr, OTHER: tl.constexpr, REACH: tl.constexpr
):
    """Which tiles of others a tile of slots sees: low, whole_low, whole_high and high.

    It sees the tiles from low to high, of which those from whole_low to whole_high need no mask.

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
def load(ARRAY, offsets, inside, MASKED: tl.constexpr):
    """Load vectors [slots, K]; zeros past the row's end."""
    if MASKED:
        return tl.load(ARRAY + offsets, mask=inside[:, None], other=0.0)
    return tl.load(ARRAY + offsets)


@triton.jit
def load_number(ARRAY, slots, inside, MASKED: tl.constexpr):
    """Load one number per slot; zeros past the row's end."""
    if MASKED:
        return tl.load(ARRAY + slots, mask=inside, other=0)
    return tl.load(ARRAY + slots)


@triton.jit
def unknown_zero(number):
    """A zero that the compiler cannot see, lest it select among halves of BF16 pairs."""
    return number * 0.0
