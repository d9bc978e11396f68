"""Floating-point operations of a training step.

A multiplication and an addition count as two. Backward costs twice as much as forward;
recomputation in the backward pass is not counted. Elementwise work, norms and the optimizer are
left out, as is usual for MFU (Chowdhery et al. 2022, "PaLM", appendix B).
"""

from __future__ import annotations

from megatron_bert.config.block_matrices import block_matrices
from megatron_bert.config.schema import ModelConfig

# Dense BF16 peak of a GPU in TFLOP/s, from NVIDIA's data sheets.
# The first name that matches is used.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
}


def peak_tflops(device_name: str) -> float | None:
    """The peak that MFU refers to, for a name such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def row_flops(
    model: ModelConfig,
    vocab_size: int,
    seq_length: int,
    masked_slots: int,
    keys_per_query: float | None = None,
) -> float:
    """Forward and backward FLOPs of one row.

    Args:
        model: the model's sizes.
        vocab_size: padded vocabulary.
        seq_length: slots of the row.
        masked_slots: slots that reach the head.
        keys_per_query: average number of slots that a slot attends to, if a kernel skips other
            segments. Default: the whole row, which is what block-diagonal attention computes.
    """
    blocks = model.num_layers * block_flops(model, seq_length, keys_per_query)
    return blocks + head_flops(model, vocab_size, masked_slots)


def block_flops(model: ModelConfig, seq_length: int, keys_per_query: float | None = None) -> float:
    """Forward and backward FLOPs of one block on one row; see `row_flops`."""
    projections = sum(matrix.size for matrix in block_matrices(model))
    keys = seq_length if keys_per_query is None else keys_per_query
    return 3 * 2 * seq_length * (projections + 2 * keys * model.hidden_size)


def head_flops(model: ModelConfig, vocab_size: int, masked_slots: int) -> int:
    """Forward and backward FLOPs of the head on one row."""
    return 3 * 2 * masked_slots * model.hidden_size * (model.hidden_size + vocab_size)
