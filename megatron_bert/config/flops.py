"""Floating-point operations of a training step, counted as they are done.

A multiplication and an addition count two. Backward costs twice forward. Elementwise work, norms
and the optimizer are left out, as everywhere where MFU is compared (Chowdhery et al. 2022,
"PaLM", appendix B).
"""

from __future__ import annotations

from megatron_bert.config.schema import ModelConfig


def row_flops(model: ModelConfig, vocab_size: int, seq_length: int, masked_slots: int) -> int:
    """Forward and backward FLOPs of one row.

    Args:
        model: the model's sizes.
        vocab_size: padded vocabulary.
        seq_length: slots of the row; each attends to the whole row, which is what block-diagonal
            attention computes where a kernel does not skip other segments.
        masked_slots: slots that reach the head.
    """
    blocks = model.num_layers * block_flops(model, seq_length)
    return blocks + head_flops(model, vocab_size, masked_slots)


def block_flops(model: ModelConfig, seq_length: int) -> int:
    """Forward and backward FLOPs of one block on one row."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    kv_size = model.num_query_groups * model.head_dim
    projections = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * ffn
    attention = 2 * seq_length * hidden
    return 3 * 2 * seq_length * (projections + attention)


def head_flops(model: ModelConfig, vocab_size: int, masked_slots: int) -> int:
    """Forward and backward FLOPs of the head on one row."""
    return 3 * 2 * masked_slots * model.hidden_size * (model.hidden_size + vocab_size)
