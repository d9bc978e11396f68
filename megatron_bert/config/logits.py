"""Logits that the head holds at a time, for training, which computes them, and for memory plans."""

from __future__ import annotations

# In elements: 128 MiB in bf16 whatever the micro-batch. As many at a time have their softmax taken
# on a GPU without our kernels.
LOGITS_PER_CHUNK = 2**26
# Of a GPU, where our kernels need no copy in fp32, and a chunk's gradient of the table, as large as
# many chunks' logits, is added to the others': 512 MiB in bf16.
GPU_LOGITS_PER_CHUNK = 2**28
# On the CPU their softmax is taken in slices of so many, whose fp32 copy stays in the cache.
CPU_SOFTMAX_ELEMENTS = 2**20


def logits_per_chunk(device_type: str) -> int:
    """How many the head holds at a time, at most, where it computes on such a device."""
    return GPU_LOGITS_PER_CHUNK if device_type == "cuda" else LOGITS_PER_CHUNK
