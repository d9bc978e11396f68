"""Parts of a step other than matrix products, timed by themselves: attention and the softmax."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from megatron_bert.benchmark.gemm import seconds_of
from megatron_bert.benchmark.kernels.attention import own_attention
from megatron_bert.config.schema import ModelConfig
from megatron_bert.data.batch import Batch

_SOFTMAX_ROWS = 512


def time_attention(
    model: ModelConfig, batch: Batch, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds of all layers' attention on a micro-batch, forward and backward.

    Local layers count as if they saw their whole segment.

    Args:
        model: heads, layers and dropout.
        batch: rows; only their segments matter.
        dtype: of the tensors.
        device: of the tensors.
    """
    inputs, attend = own_attention(model, batch, model.attention_dropout, dtype, device)
    grad = torch.randn_like(attend())
    seconds = seconds_of(lambda: torch.autograd.grad(attend(), inputs, grad), device)
    return model.num_layers * seconds


def time_softmax(masked: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the cross-entropy over a micro-batch's logits, forward and backward.

    Args:
        masked: rows of logits.
        vocab_size: columns of logits.
        dtype: of the logits.
        device: of the logits.
    """
    rows = min(masked, _SOFTMAX_ROWS)
    logits = torch.randn(rows, vocab_size, dtype=dtype, device=device, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    seconds = seconds_of(
        lambda: torch.autograd.grad(F.cross_entropy(logits.float(), labels), logits), device
    )
    return seconds * masked / rows
