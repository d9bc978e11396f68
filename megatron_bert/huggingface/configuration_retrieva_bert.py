# SPDX-License-Identifier: Apache-2.0
"""Configuration of RetrievaBERT for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class RetrievaBertConfig(PretrainedConfig):
    """Shape of a RetrievaBERT encoder; the defaults are those of RetrievaBERT-1.3B.

    Args:
        vocab_size: rows of the embedding table.
        hidden_size: width of the residual stream.
        num_hidden_layers: transformer blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; 1 is multi-query attention.
        intermediate_size: columns of the gate and of the up projection each.
        hidden_act: activation of the gate.
        mlp_bias: whether gate, up and down projection have biases.
        lm_head_hidden_act: activation in the masked-language-model head.
        hidden_dropout_prob: dropout on embeddings and sub-layer outputs.
        attention_probs_dropout_prob: dropout on attention weights.
        classifier_dropout: dropout before the classifiers; default: `hidden_dropout_prob`.
        max_position_embeddings: rows of the learned position table.
        position_embedding_type: only `absolute` exists.
        type_vocab_size: 0, there are no token types.
        initializer_range: standard deviation of new weights.
        layer_norm_eps: epsilon of every norm.
        pad_token_id: id of the padding token.
        bos_token_id: id of the begin-of-text token, as published; an encoder has no use for it.
        eos_token_id: id of the end-of-text token, as published.
        tie_word_embeddings: whether the decoder is the embedding table.
        **kwargs: what every configuration takes.

    Raises:
        ValueError: heads do not divide the width, or key/value heads the query heads.
    """

    model_type = "retrieva-bert"

    def __init__(
        self,
        vocab_size: int = 99584,
        hidden_size: int = 1536,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 24,
        num_key_value_heads: int = 1,
        intermediate_size: int = 4096,
        hidden_act: str = "silu",
        mlp_bias: bool = True,
        lm_head_hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        max_position_embeddings: int = 2048,
        position_embedding_type: str = "absolute",
        type_vocab_size: int = 0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 4,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size={hidden_size} is not a multiple of "
                f"num_attention_heads={num_attention_heads}"
            )
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={num_attention_heads} is not a multiple of "
                f"num_key_value_heads={num_key_value_heads}"
            )
        if position_embedding_type != "absolute":
            raise ValueError(
                f"position_embedding_type={position_embedding_type!r}: only 'absolute' exists"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.mlp_bias = mlp_bias
        self.lm_head_hidden_act = lm_head_hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.max_position_embeddings = max_position_embeddings
        self.position_embedding_type = position_embedding_type
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def head_dropout(self) -> float:
        """Dropout before the classifiers."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob
        return self.classifier_dropout
