"""Flash attention's two functions in plain PyTorch, put where transformers loads the real ones.

What runs between the model and them, padding taken out and put back above all, is transformers'.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utilities
from torch import Tensor


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool
) -> Tensor:
    """[B, S, H, K], [B, S, G, K] twice -> [B, S, H, K]; every row is one text."""
    assert not causal
    assert dropout_p == 0.0
    repeats = q.shape[2] // k.shape[2]
    k, v = (tensor.repeat_interleave(repeats, 2) for tensor in (k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) * softmax_scale
    return torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """[T, H, K] of texts end to end, with borders [number of texts + 1] -> [T, H, K]."""
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert int(cu_seqlens_q[-1]) == q.shape[0]
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q == max_seqlen_k
    borders = cu_seqlens_q.tolist()
    texts = [
        flash_attn_func(
            *(tensor[None, begin:end] for tensor in (q, k, v)), dropout_p, softmax_scale, causal
        )[0]
        for begin, end in pairwise(borders)
    ]
    return torch.cat(texts)


def use_flash_reference(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Let `model` attend through transformers' flash attention and the functions above."""
    pads = (flash_utilities._pad_input, flash_utilities._unpad_input)
    functions: tuple[Any, ...] = (flash_attn_func, flash_attn_varlen_func, *pads)
    if hasattr(flash_utilities, "_flash_with_kvcache_fn"):
        functions = (flash_attn_func, flash_attn_varlen_func, None, *pads)
    monkeypatch.setattr(flash_utilities, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_process_flash_kwargs_fn"):
        if hasattr(flash_utilities, name):
            monkeypatch.setattr(flash_utilities, name, None)
    # Not through the setter, which would look for the real library.
    model.config._attn_implementation = "flash_attention_2"
