"""Tiny models and a tokenizer for them, made from nothing."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_bert.huggingface.configuration_retrieva_bert import RetrievaBertConfig
from megatron_bert.huggingface.modeling_retrieva_bert import (
    RetrievaBertForMaskedLM,
    RetrievaBertForMultipleChoice,
    RetrievaBertForQuestionAnswering,
    RetrievaBertForSequenceClassification,
    RetrievaBertForTokenClassification,
    RetrievaBertModel,
)

HEADS = {
    "MaskedLM": RetrievaBertForMaskedLM,
    "SequenceClassification": RetrievaBertForSequenceClassification,
    "TokenClassification": RetrievaBertForTokenClassification,
    "QuestionAnswering": RetrievaBertForQuestionAnswering,
    "MultipleChoice": RetrievaBertForMultipleChoice,
}
MODELS = (RetrievaBertModel, *HEADS.values())

_SPECIAL = ("<unk>", "<s>", "</s>", "<MASK>", "<PAD>", "<CLS>", "<SEP>", "<EOD>")
_CHARACTERS = f"{string.ascii_letters}{string.digits} .,!?吾輩は猫である名前まだ無い。"
VOCABULARY = len(_SPECIAL) + len(_CHARACTERS)
PAD_ID, CLS_ID, SEP_ID = 4, 5, 6


def tiny_config(**changes: Any) -> RetrievaBertConfig:
    """Two layers of width 32 without dropout; `changes` replace or add keys."""
    keys: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # Wide enough that attention matters.
        "initializer_range": 0.2,
    }
    return RetrievaBertConfig(**{**keys, **changes})


def tiny_tokenizer(characters: str = _CHARACTERS) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters with the pretraining's special tokens and template."""
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<CLS> $A <SEP>",
        pair="<CLS> $A <SEP> $B <SEP>",
        special_tokens=[("<CLS>", CLS_ID), ("<SEP>", SEP_ID)],
    )
    roles = ("unk", "bos", "eos", "mask", "pad", "cls", "sep")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in zip(roles, _SPECIAL, strict=False)},
    )
