"""How many logits the head holds at a time, for training and for memory plans."""

from __future__ import annotations

# In elements: 128 MiB in bf16, whatever the micro-batch. On a GPU without our kernels, the softmax
# is also taken of this many at a time.
LOGITS_PER_CHUNK = 2**26
# On a GPU: 512 MiB in bf16. Our kernels need no copy in fp32 there, and each chunk's gradient of
# the table, as large as many chunks' logits, has to be added to the others'.
GPU_LOGITS_PER_CHUNK = 2**28
# On the CPU the softmax is taken in slices of this size, whose fp32 copy stays in the cache.
CPU_SOFTMAX_ELEMENTS = 2**20


def logits_per_chunk(device_type: str) -> int:
    """The maximum number of logits that the head holds at a time on such a device."""
    return GPU_LOGITS_PER_CHUNK if device_type == "cuda" else LOGITS_PER_CHUNK
