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
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    kv_size = model.num_query_groups * model.head_dim
    projections = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * ffn
    attention = 2 * seq_length * hidden
    head = hidden * hidden + hidden * vocab_size
    forward = 2 * (seq_length * model.num_layers * (projections + attention) + masked_slots * head)
    return 3 * forward
