"""Triton kernels of the softmax over a vocabulary.

Logits are dense [n, size], of n tokens and this rank's part of the vocabulary.
"""

# Kernel arguments have Triton's own types: they are values on the GPU.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_statistics_kernel(
    LOGITS, LABELS, LARGEST, LOG_SUM, LABEL_LOGIT, size, COLUMNS: tl.constexpr
):
    """Each row's largest logit, logarithm of its sum of exponentials, and logit of its label.

    LABELS, int32 [n], are counted from this part's first id; a label outside the part has logit 0.
    The outputs are fp32 [n].

    Grid: n.
    """
    row = tl.program_id(0)
    LOGITS += row.to(tl.int64) * size
    largest = tl.full([COLUMNS], -float("inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, size, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        logits = tl.load(LOGITS + columns, mask=columns < size, other=-float("inf")).to(tl.float32)
        largest_now = tl.maximum(largest, logits)
        # A column that has seen no logit yet is still at minus infinity.
        reference = tl.where(largest_now == -float("inf"), 0.0, largest_now)
        total = total * tl.exp(largest - reference) + tl.exp(logits - reference)
        largest = largest_now
    highest = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - highest), 0)
    label = tl.load(LABELS + row)
    present = (label >= 0) & (label < size)
    label_logit = tl.load(LOGITS + label, mask=present, other=0.0).to(tl.float32)
    tl.store(LARGEST + row, highest)
    tl.store(LOG_SUM + row, highest + tl.log(total))
    tl.store(LABEL_LOGIT + row, label_logit)


@triton.jit
def softmax_gradient_kernel(LOGITS, LABELS, LOG_SUM, WEIGHTS, size, COLUMNS: tl.constexpr):
    """Write (softmax - one-hot label) x weight over the logits.

    LOG_SUM and WEIGHTS are fp32 [n]; LOG_SUM is that of the whole vocabulary's exponentials.

    Grid: n * tiles of columns.
    """
    tiles = tl.cdiv(size, COLUMNS)
    row = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    LOGITS += row.to(tl.int64) * size
    log_sum, weight = tl.load(LOG_SUM + row), tl.load(WEIGHTS + row)
    logits = tl.load(LOGITS + columns, mask=columns < size, other=0.0).to(tl.float32)
    gradient = tl.exp(logits - log_sum) - tl.where(columns == tl.load(LABELS + row), 1.0, 0.0)
    gradient = (gradient * weight).to(LOGITS.dtype.element_ty)
    tl.store(LOGITS + columns, gradient, mask=columns < size)
