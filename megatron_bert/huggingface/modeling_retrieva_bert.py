# SPDX-License-Identifier: Apache-2.0
"""RetrievaBERT for transformers: PreNorm, SwiGLU, multi-query attention, learned positions.

Shape suffixes: B rows, S slots, D hidden, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

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
    """Attention written out, which also returns its weights, in transformers' calling convention.

    `attention_mask` is boolean, true where a slot is seen, and broadcasts to [B, H, S, S].

    Returns:
        [B, S, H, K] and the weights [B, H, S, S].
    """
    key_BHSK = key_BGSK.repeat_interleave(module.num_key_value_groups, dim=1)
    value_BHSK = value_BGSK.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BHSS = query_BHSK @ key_BHSK.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHSS = scores_BHSS.masked_fill(~attention_mask, torch.finfo(scores_BHSS.dtype).min)
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
        """Add positions to word embeddings: [B, S, D] and [1 or B, S] -> [B, S, D].

        Raises:
            ValueError: a position outside the table, on a CPU and not compiled.
        """
        try:
            positions_BSD = self.position_embeddings(position_ids)
        except IndexError as error:  # checking first would make a GPU wait
            table = self.position_embeddings.num_embeddings
            raise ValueError(
                f"position_ids go from {int(position_ids.min())} to {int(position_ids.max())}, and "
                f"the position table from 0 to {table - 1}; count each text from 0 and truncate "
                f"texts to {table} tokens"
            ) from error
        y_BSD: Tensor = self.dropout(words_BSD + positions_BSD)
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
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> [B, S, D] and the attention weights, where the function gives them.

        Raises:
            ValueError: the weights are asked for, and the attention function has none.
        """
        q, k, v = (
            projection(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        name = self.config._attn_implementation
        # SDPA takes the same mask and never has the weights.
        eager = name == "eager" or (name == "sdpa" and output_attentions)
        attention = eager_attention if eager else ALL_ATTENTION_FUNCTIONS[name]
        y_BSHK, weights = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            output_attentions=output_attentions,
            **kwargs,
        )
        if output_attentions and weights is None:
            raise ValueError(
                f"output_attentions=True: attn_implementation={name!r} has no attention weights; "
                "call model.set_attn_implementation('eager'), or 'sdpa', first"
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


class RetrievaBertLayer(GradientCheckpointingLayer):
    """PreNorm block."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.attention = RetrievaBertAttention(config)
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = RetrievaBertMLP(config)

    def forward(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> [B, S, D] and the attention weights, where they are asked for."""
        y_BSD, weights = self.attention(
            x_BSD, attention_mask, output_attentions=output_attentions, **kwargs
        )
        x_BSD = x_BSD + y_BSD
        # What a layer returns stays in memory, gradient checkpointing or not: H x S x S for each
        # row.
        return x_BSD + self.mlp(self.ln(x_BSD)), weights if output_attentions else None


class RetrievaBertEncoder(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            RetrievaBertLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """[B, S, D] -> the last hidden states, and what else is asked for; the rest is dropped."""
        hidden_states, attentions = [], []
        for layer in self.layer:
            if output_hidden_states:
                hidden_states.append(x_BSD)
            x_BSD, weights = layer(
                x_BSD, attention_mask, output_attentions=output_attentions, **kwargs
            )
            attentions.append(weights)
        x_BSD = self.ln(x_BSD)
        return BaseModelOutput(
            last_hidden_state=x_BSD,
            hidden_states=(*hidden_states, x_BSD) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def first_seen(padding_BS: Tensor) -> Tensor:
    """Slot of each row's first token, [B]: 0 but for rows that are padded on the left."""
    return (padding_BS != 0).int().argmax(1)


def text_numbers(position_ids: Tensor) -> Tensor:
    """Number the texts of each row, [B, S]: one begins wherever a position is 0."""
    return (position_ids == 0).cumsum(1)


def visibility_mask(padding_BS: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """The mask for eager and SDPA attention: true where a slot is seen, or None if all are.

    Returns:
        [B, 1, S or 1, S]: no padding is seen, and no other text of the row.
    """
    visible = None if padding_BS is None else padding_BS.bool()[:, None, None, :]
    if position_ids is not None:
        text_BS = text_numbers(position_ids)
        same_text = (text_BS[:, :, None] == text_BS[:, None, :])[:, None]
        visible = same_text if visible is None else visible & same_text
    if visible is None:
        return None
    # Softmax over no slot is NaN, which would spread from the padding's values to all.
    return visible | ~visible.any(-1, keepdim=True)


def flash_arguments(
    padding_BS: Tensor | None, position_ids: Tensor | None, rows: int
) -> dict[str, Any]:
    """Arguments that flash attention functions take instead of a mask, for a batch of `rows` rows.

    Without `position_ids` the padding mask is all they need. Texts that share a row are given by
    where they begin among all slots of the batch, and padding forms texts of its own.

    Raises:
        ValueError: padding in the middle of a text of a packed row.
    """
    if position_ids is None:
        unpadded = padding_BS is None or bool(padding_BS.all())
        return {"attention_mask": None if unpadded else padding_BS}
    text_BS = text_numbers(position_ids).expand(rows, -1)
    if padding_BS is not None:
        text_BS = text_BS.masked_fill(padding_BS == 0, -1)
    begins_BS = torch.ones_like(text_BS, dtype=torch.bool)
    begins_BS[:, 1:] = text_BS[:, 1:] != text_BS[:, :-1]
    seen_before = text_BS[:, 1:] == text_BS.cummax(1).values[:, :-1]
    if (begins_BS[:, 1:] & seen_before).any():
        raise ValueError(
            "attention_mask hides tokens in the middle of a text, which flash attention cannot "
            "do beside position_ids; use attn_implementation='sdpa'"
        )
    borders = F.pad(begins_BS.flatten().nonzero().flatten(), (0, 1), value=begins_BS.numel())
    borders = borders.to(torch.int32)
    longest = int(borders.diff().max())
    return {
        "attention_mask": None,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class RetrievaBertPreTrainedModel(PreTrainedModel):
    """What all models of this family share."""

    config_class = RetrievaBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["RetrievaBertEmbeddings", "RetrievaBertLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # A pretrained checkpoint contains the head for masked words, which the other models here do not
    # use; without this, transformers would report its weights as unexpected.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^cls\."]
    # Trainer divides a loss that is a mean over the batch at hand by its accumulation steps; the
    # heads that take `num_items_in_batch` set this to True.
    accepts_loss_kwargs = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers would guess from this file's text, by patterns that change with its releases.
        return True

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

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: [B, S] ids; this or `inputs_embeds`.
            attention_mask: [B, S], 0 at padding, which no slot attends to. Without it every slot
                is attended to, padding too.
            position_ids: [1 or B, S]; where they restart at 0 a new text begins, and texts packed
                into one row do not see each other. Default: 0, 1, 2, ... from the first slot that
                `attention_mask` does not hide, so that padding on the left changes no text. All
                must lie within the position table. On a CPU, if nothing is compiled, the error
                names those outside; a GPU fails with an assertion of its own.
            inputs_embeds: [B, S, D] in place of `input_ids`.
            output_attentions: return the attention weights; SDPA then gives way to eager attention.
            output_hidden_states: return the hidden states before each block and after the last.
            **kwargs: handed to the attention function; `return_dict=False` asks for a tuple.

        Returns:
            The last hidden states [B, S, D], and what else was asked for.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, a row longer than the
                position table, on a CPU a position outside it, an attention mask of another shape,
                or attention weights asked of an attention function that has none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}; give [B, S], and "
                "position_ids that restart at 0 where several texts share a row"
            )
        if "flash" in self.config._attn_implementation:
            arguments = flash_arguments(attention_mask, position_ids, inputs_embeds.shape[0])
        else:
            arguments = {"attention_mask": visibility_mask(attention_mask, position_ids)}
        if position_ids is None:
            position_ids = self._counted_positions(inputs_embeds, attention_mask)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs: BaseModelOutput = self.encoder(
            self.embeddings(inputs_embeds, position_ids),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **{**arguments, **kwargs},
        )
        return outputs

    def _counted_positions(self, inputs_embeds: Tensor, padding_BS: Tensor | None) -> Tensor:
        length = inputs_embeds.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"a row of {length} tokens is longer than the position table, "
                f"{self.config.max_position_embeddings}; truncate it (truncation=True)"
            )
        slots = torch.arange(length, device=inputs_embeds.device)[None]
        if padding_BS is None:
            return slots
        return (slots - first_seen(padding_BS)[:, None]).clamp(min=0)


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
    """Hidden states to logits over the vocabulary.

    The bias is the head's own and not the decoder's, so that it is stored once, under one name,
    whether or not the decoder is the embedding table.
    """

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__()
        self.transform = RetrievaBertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def resize_bias(self, vocab_size: int) -> None:
        """Cut the bias to `vocab_size`, or fill it up with zeros."""
        if vocab_size == self.bias.shape[0]:
            return  # an optimizer may know the parameter already
        resized = F.pad(self.bias.detach(), (0, vocab_size - self.bias.shape[0]))
        self.bias = nn.Parameter(resized, requires_grad=self.bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        y: Tensor = self.decoder(self.transform(x)) + self.bias
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

    _tied_weights_keys: ClassVar = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }
    # BERT's implementations store the bias under a second name too.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"predictions\.decoder\.bias"]
    accepts_loss_kwargs = True

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

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the vocabulary, the head's bias included; arguments as in transformers."""
        embeddings: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.cls.predictions.resize_bias(embeddings.num_embeddings)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict every token; with `labels`, [B, S] and -100 where not asked, also the mean loss.

        `num_items_in_batch` is what the loss's sum is divided by, instead of the labels at hand;
        the other arguments are those of `RetrievaBertModel.forward`.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits_BSV = self.cls(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BSV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return MaskedLMOutput(
            loss=loss,
            logits=logits_BSV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RetrievaBertClassificationHead(nn.Module):
    """A row's first token (`<CLS>`) through a dense layer, tanh and a projection.

    All that is new stands under one name: PEFT trains and saves what is called `classifier`
    beside its adapters, and freezes the rest.
    """

    def __init__(self, config: RetrievaBertConfig, num_labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, x_BSD: Tensor, padding_BS: Tensor | None) -> Tensor:
        """[B, S, D] and the padding mask, if any -> [B, number of labels]."""
        if padding_BS is None:
            first_BD = x_BSD[:, 0]
        else:
            rows = torch.arange(x_BSD.shape[0], device=x_BSD.device)
            first_BD = x_BSD[rows, first_seen(padding_BS)]
        logits: Tensor = self.out_proj(self.dropout(torch.tanh(self.dense(first_BD))))
        return logits


class RetrievaBertForSequenceClassification(RetrievaBertPreTrainedModel):
    """The encoder with a label, several labels or a number for each row.

    `config.problem_type` is `regression`, `single_label_classification` or
    `multi_label_classification`; transformers infers it from `num_labels` and the type of `labels`.
    """

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = RetrievaBertModel(config)
        self.classifier = RetrievaBertClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, number of labels]; with `labels`, [B] or [B, number of labels], also the loss.

        The other arguments are those of `RetrievaBertModel.forward`.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RetrievaBertForTokenClassification(RetrievaBertPreTrainedModel):
    """The encoder with a label for each token."""

    accepts_loss_kwargs = True

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = RetrievaBertModel(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits [B, S, number of labels]; with `labels`, [B, S] and -100 for none, also the loss.

        `num_items_in_batch` is what the loss's sum is divided by, instead of the labels at hand;
        the other arguments are those of `RetrievaBertModel.forward`.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config, num_items_in_batch=num_items_in_batch
            )
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RetrievaBertForQuestionAnswering(RetrievaBertPreTrainedModel):
    """The encoder with the first and the last token of an answer within each row."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__(config)
        self.bert = RetrievaBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Logits [B, S] of both ends; with their slots, [B] each, also the mean of both losses.

        A slot outside the row counts as no answer and is left out of the loss. The other arguments
        are those of `RetrievaBertModel.forward`.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        start_BS, end_BS = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_BS, end_BS, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_BS,
            end_logits=end_BS,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RetrievaBertForMultipleChoice(RetrievaBertPreTrainedModel):
    """The encoder with a score for each of C choices, every choice a row of its own."""

    def __init__(self, config: RetrievaBertConfig) -> None:
        super().__init__(config)
        self.bert = RetrievaBertModel(config)
        self.classifier = RetrievaBertClassificationHead(config, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Logits [B, C]; with `labels`, [B], also the loss.

        The other arguments are those of `RetrievaBertModel.forward`, with [B, C, S] for [B, S].
        """
        ids, mask, positions, embeds = (
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, position_ids, inputs_embeds)
        )
        outputs = self.bert(
            ids,
            attention_mask=mask,
            position_ids=positions,
            inputs_embeds=embeds,
            return_dict=True,
            **kwargs,
        )
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None  # the encoder has checked that
        scores = self.classifier(outputs.last_hidden_state, mask)
        logits_BC = scores.view(given.shape[:2])
        return MultipleChoiceModelOutput(
            loss=None if labels is None else F.cross_entropy(logits_BC, labels),
            logits=logits_BC,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
