"""Named model shapes; a key given beside `model.preset` overrides the preset's value."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

PresetName = Literal["retrievabert-1.3b", "modernbert-base"]

LLM_JP_VOCABULARY = 99_584
"""Rows for LLM-jp v3.0's tokenizer: its 99,574 pieces, padded to a multiple of 128."""

# RetrievaBERT's published config.json: multi-query attention, SwiGLU, learned positions.
_RETRIEVABERT_1_3B: Mapping[str, int | float | str] = MappingProxyType(
    {
        "num_layers": 48,
        "hidden_size": 1536,
        "ffn_hidden_size": 4096,
        "num_attention_heads": 24,
        "num_query_groups": 1,
        "max_position_embeddings": 2048,
        "vocab_size": LLM_JP_VOCABULARY,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "norm_eps": 1e-12,
        "init_std": 0.02,
    }
)

# ModernBERT's published config.json, except for the vocabulary, which is the tokenizer's.
_MODERNBERT_BASE: Mapping[str, int | float | str] = MappingProxyType(
    {
        "architecture": "modernbert",
        "num_layers": 22,
        "hidden_size": 768,
        "ffn_hidden_size": 1152,
        "num_attention_heads": 12,
        "num_query_groups": 12,
        "max_position_embeddings": 8192,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "norm_eps": 1e-5,
        "init_std": 0.02,
        "rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        "local_attention": 128,
        "global_attention_every": 3,
    }
)

PRESETS: Mapping[PresetName, Mapping[str, int | float | str]] = MappingProxyType(
    {"retrievabert-1.3b": _RETRIEVABERT_1_3B, "modernbert-base": _MODERNBERT_BASE}
)
