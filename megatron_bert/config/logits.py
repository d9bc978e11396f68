"""Logits that the head holds at a time, for training, which computes them, and for memory plans."""

from __future__ import annotations

# In elements: 128 MiB in bf16 whatever the micro-batch.
LOGITS_PER_CHUNK = 2**26
# On the CPU their softmax is taken in slices of so many, whose fp32 copy stays in the cache.
CPU_SOFTMAX_ELEMENTS = 2**20
