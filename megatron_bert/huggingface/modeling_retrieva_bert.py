"""RetrievaBERT for transformers: PreNorm, SwiGLU, multi-query attention, learned positions.

Shape suffixes: B rows, S slots, D hidden, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_retrieva_bert import RetrievaBertConfig


def eager_attention(
    module: RetrievaBertSelfAttention,
    query_BHSK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, which also returns its weights; in transformers' calling convention.

    Returns:
        [B, S, H, K] and the weights [B, H, S, S].
    """
    key_BHSK = key_BGSK.repeat_interleave(module.num_key_value_groups, dim=1)
    value_BHSK = value_BGSK.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BHSS = query_BHSK @ key_BHSK.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHSS = scores_BHSS + attention_mask
    weights_BHSS = scores_BHSS.softmax(-1, dtype=torch.float32).to(query_BHSK.dtype)
    weights_BHSS = F.dropout(weights_BHSS, dropout, module.training)
    return (weights_BHSS @ value_BHSK).transpose(1, 2).contiguous(), weights_BHSS


class RetrievaBertEmbeddings(nn.Module):
    """Sum of word and learned absolute position embeddings."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words_BSD: Tensor, position_ids: Tensor) -> Tensor:
        """Add positions to word embeddings: [B, S, D] and [1 or B, S] -> [B, S, D]."""
        y_BSD: Tensor = self.dropout(words_BSD + self.position_embeddings(position_ids))
        return y_BSD


class RetrievaBertSelfAttention(nn.Module):
    """Projections and the attention function that the configuration asks for."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        kv_size = config.num_key_value_heads * self.head_dim
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, kv_size)
        self.value = nn.Linear(config.hidden_size, kv_size)

    def forward(
        self, x_BSD: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> [B, S, D] and the attention weights, where the function gives them."""
        q, k, v = (
            projection(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        name = self.config._attn_implementation
        attention = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        y_BSHK, weights = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return y_BSHK.reshape(x_BSD.shape), weights


class RetrievaBertSelfOutput(nn.Module):
    """Projection of the heads back into the residual stream."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        y_BSD: Tensor = self.dropout(self.dense(x_BSD))
        return y_BSD


class RetrievaBertAttention(nn.Module):
    """Norm, self-attention, output projection."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self = RetrievaBertSelfAttention(config)
        self.output = RetrievaBertSelfOutput(config)

    def forward(
        self, x_BSD: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> what is added to the residual stream, and the attention weights."""
        y_BSD, weights = self.self(self.ln(x_BSD), attention_mask, **kwargs)
        return self.output(y_BSD), weights


class RetrievaBertMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x))."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        y: Tensor = self.dropout(
            self.down_proj(self.act_fn(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))
        )
        return y


class RetrievaBertLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """PreNorm block."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.attention = RetrievaBertAttention(config)
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = RetrievaBertMLP(config)

    def forward(
        self, x_BSD: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> [B, S, D] and the attention weights."""
        y_BSD, weights = self.attention(x_BSD, attention_mask, **kwargs)
        x_BSD = x_BSD + y_BSD
        return x_BSD + self.mlp(self.ln(x_BSD)), weights


class RetrievaBertEncoder(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            RetrievaBertLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, x_BSD: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Return the last hidden states, those before each block with the last, and the weights."""
        hidden_states, attentions = [], []
        for layer in self.layer:
            hidden_states.append(x_BSD)
            x_BSD, weights = layer(x_BSD, attention_mask, **kwargs)
            attentions.append(weights)
        x_BSD = self.ln(x_BSD)
        return x_BSD, (*hidden_states, x_BSD), tuple(attentions)


class RetrievaBertPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all models of this family share."""

    config_class = RetrievaBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ("RetrievaBertEmbeddings", "RetrievaBertLayer")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # The loss is a mean over the batch at hand: Trainer is to divide by its accumulation steps.
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, RetrievaBertLMPredictionHead):
            nn.init.zeros_(module.bias)


class RetrievaBertModel(RetrievaBertPreTrainedModel):
    """The encoder: ids to hidden states."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__(config)
        self.embeddings = RetrievaBertEmbeddings(config)
        self.encoder = RetrievaBertEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding table."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embedding table."""
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode a batch.

        Args:
            input_ids: [B, S] ids; this or `inputs_embeds`.
            attention_mask: [B, S], 0 at padding, which no slot attends to.
            position_ids: [B, S]; where they restart at 0 a new text begins, and texts packed into
                one row do not see each other. Default: 0, 1, 2, ...
            inputs_embeds: [B, S, D] in place of `input_ids`.
            output_attentions: return the attention weights (with eager attention only).
            output_hidden_states: return the hidden states before each block and after the last.
            return_dict: return an output object (the default) or a tuple.
            **kwargs: handed to the attention function.

        Returns:
            The last hidden states [B, S, D], and what else was asked for.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or a row longer than
                the position table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        length = inputs_embeds.shape[1]
        mask = self._visible(attention_mask, position_ids, inputs_embeds)
        if position_ids is None:
            if length > self.config.max_position_embeddings:
                raise ValueError(
                    f"a row of {length} tokens is longer than the position table, "
                    f"{self.config.max_position_embeddings}; truncate it (truncation=True)"
                )
            position_ids = torch.arange(length, device=inputs_embeds.device)[None]
        x_BSD, hidden_states, attentions = self.encoder(
            self.embeddings(inputs_embeds, position_ids), mask, **kwargs
        )
        config = self.config
        wants_states = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        wants_weights = config.output_attentions if output_attentions is None else output_attentions
        output = BaseModelOutput(
            last_hidden_state=x_BSD,
            hidden_states=hidden_states if wants_states else None,
            attentions=attentions if wants_weights else None,
        )
        return output if _wants_dict(return_dict, config) else output.to_tuple()

    def _visible(
        self, padding_BS: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor
    ) -> Tensor | None:
        """What attention functions take as mask: [B, 1, S, S], 0 or minus infinity, or None.

        Flash attention takes the padding mask itself; it has no use for another.
        """
        if padding_BS is not None and padding_BS.dim() != 2:
            raise ValueError(
                f"attention_mask has the shape {tuple(padding_BS.shape)}; give [B, S], and "
                "position_ids that restart at 0 where several texts share a row"
            )
        if "flash" in self.config._attn_implementation:
            if position_ids is not None:
                raise ValueError(
                    "position_ids need a block-diagonal mask, which flash attention does not "
                    "take; use attn_implementation='sdpa'"
                )
            return padding_BS
        visible: Tensor | None = None
        if padding_BS is not None:
            visible = padding_BS.bool()[:, None, None, :]
        if position_ids is not None:
            text_BS = (position_ids == 0).cumsum(1)
            same_text = (text_BS[:, :, None] == text_BS[:, None, :])[:, None]
            visible = same_text if visible is None else visible & same_text
        if visible is None:
            return None
        count, length = inputs_embeds.shape[:2]
        bias = torch.zeros(
            (count, 1, length, length), dtype=inputs_embeds.dtype, device=inputs_embeds.device
        )
        # Not infinity: a row of padding alone would be NaN.
        return bias.masked_fill(~visible, torch.finfo(bias.dtype).min)


class RetrievaBertPredictionHeadTransform(nn.Module):
    """Dense, activation and norm before the decoder."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.lm_head_hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y: Tensor = self.LayerNorm(self.act_fn(self.dense(x)))
        return y


class RetrievaBertLMPredictionHead(nn.Module):
    """Hidden states to logits over the vocabulary."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.transform = RetrievaBertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def _tie_weights(self) -> None:
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        y: Tensor = self.decoder(self.transform(x))
        return y


class RetrievaBertOnlyMLMHead(nn.Module):
    """The masked-language-model head under its published name."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.predictions = RetrievaBertLMPredictionHead(config)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        y: Tensor = self.predictions(x)
        return y


class RetrievaBertForMaskedLM(RetrievaBertPreTrainedModel):
    """The encoder with its masked-language-model head."""

    _tied_weights_keys = {  # noqa: RUF012 - transformers reads a plain dict of the class
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__(config)
        self.bert = RetrievaBertModel(config)
        self.cls = RetrievaBertOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder, whose weight is the embedding table."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the decoder (transformers resizes vocabularies by this)."""
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Predict every token; with `labels`, [B, S] and -100 where not asked, also the mean loss.

        The other arguments are those of `RetrievaBertModel.forward`.
        """
        outputs = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits_BSV = self.cls(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV.float().flatten(0, 1), labels.flatten())
        output = MaskedLMOutput(
            loss=loss,
            logits=logits_BSV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


def _wants_dict(return_dict: bool | None, config: RetrievaBertConfig) -> bool:
    wanted: bool = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return wanted
