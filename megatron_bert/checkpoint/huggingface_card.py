"""The model card of an export: a README.md for people, with the metadata that the Hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from megatron_bert.checkpoint.huggingface_card_training import (
    RunFigures,
    table,
    training_sections,
)
from megatron_bert.checkpoint.huggingface_config import ExportDtype, torch_name
from megatron_bert.checkpoint.run_state import RunState
from megatron_bert.config.architectures import ArchitectureName
from megatron_bert.config.schema import ModelConfig

_USAGE = """\
from transformers import AutoModel, AutoTokenizer, pipeline

model = "."  # this directory, or the name under which it was published

fill = pipeline("fill-mask", model{trust})
for guess in fill("{masked}", top_k=3):
    print(guess["token_str"], guess["score"])

tokenizer = AutoTokenizer.from_pretrained(model{trust})
encoder = AutoModel.from_pretrained(model{trust})
texts = tokenizer(["{first}", "{second}"], padding=True, return_tensors="pt")
vectors = encoder(**texts).last_hidden_state  # [texts, tokens, {hidden}]
"""


class _Samples(NamedTuple):
    """Texts for the sample code: one with a place for a mask, and two to encode."""

    masked: str
    first: str
    second: str


_SAMPLES: Mapping[str, _Samples] = MappingProxyType(
    {
        "ja": _Samples("東京は日本の{mask}です。", "吾輩は猫である。", "名前はまだ無い。"),
        "en": _Samples(
            "London is the {mask} of England.",
            "It was the best of times.",
            "It was the worst of times.",
        ),
    }
)
_SAMPLES_OF_NO_LANGUAGE = _Samples("1, 2, 3, {mask}, 5", "1, 2, 3", "a, b, c, d")

_NAMES: Mapping[ArchitectureName, str] = MappingProxyType(
    {"retrievabert": "RetrievaBERT", "modernbert": "ModernBERT"}
)
_SUMMARIES: Mapping[ArchitectureName, str] = MappingProxyType(
    {
        "retrievabert": "A BERT-type encoder (PreNorm, SwiGLU, learned positions), pretrained by "
        "masked language modelling.\nIts modeling code travels with it: load it with "
        "`trust_remote_code=True`.",
        "modernbert": "A BERT-type encoder (PreNorm, GEGLU, rotary positions, local and global "
        "attention), pretrained by\nmasked language modelling. Its modeling code is transformers' "
        "own.",
    }
)


# What tests/huggingface runs the exported code and tokenizers on.
TESTED_RELEASES = ("4.57.6", "5.24.0")
_CODE_LICENSE = "Apache-2.0"


def model_card(
    model: ModelConfig,
    vocab_size: int,
    dtype: ExportDtype,
    *,
    num_pieces: int,
    num_parameters: int,
    mask_token: str,
    state: RunState,
    figures: RunFigures | None,
    license_id: str,
    languages: Sequence[str] = (),
) -> str:
    """Return the card's text, Markdown behind YAML.

    Args:
        model: the encoder's shape.
        vocab_size: rows of the embedding table, padding included.
        dtype: type of the weights.
        num_pieces: pieces of the tokenizer; rows beyond them are spare.
        num_parameters: parameters of the model, the tied decoder counted once.
        mask_token: how a mask is written in text.
        state: what the checkpoint says of its run.
        figures: what the run measured; None if its metrics are not at hand.
        license_id: the licence of the weights, in the Hub's words.
        languages: ISO 639 codes of the languages that it was trained on; empty if they are not
            given. The sample code's texts are in the first of them that has samples here.
    """
    sections = (
        _front_matter(license_id, languages, mask_token),
        f"# {_NAMES[model.architecture]} encoder, {num_parameters:,} parameters\n",
        f"{_SUMMARIES[model.architecture]}\n",
        "## Usage\n",
        f"```python\n{_usage(model, mask_token, languages)}```\n",
        "\n".join(f"- {note}" for note in _notes(model, dtype, state)) + "\n",
        "## Architecture\n",
        table(_architecture(model, vocab_size, num_pieces, dtype, num_parameters)),
        "## Training\n",
        *training_sections(state, figures),
    )
    return "\n".join(sections)


def _front_matter(license_id: str, languages: Sequence[str], mask_token: str) -> str:
    # Quoted: without quotes, Norwegian's code is a boolean in YAML.
    language = f"language: {json.dumps(list(languages))}\n" if languages else ""
    return (
        "---\n"
        f"license: {license_id}\n"
        f"{language}"
        "library_name: transformers\n"
        "pipeline_tag: fill-mask\n"
        f'mask_token: "{mask_token}"\n'
        "---\n"
    )


def _usage(model: ModelConfig, mask_token: str, languages: Sequence[str]) -> str:
    found = (_SAMPLES[code] for code in languages if code in _SAMPLES)
    samples = next(found, _SAMPLES_OF_NO_LANGUAGE)
    trust = ", trust_remote_code=True" if model.architecture == "retrievabert" else ""
    return _USAGE.format(
        masked=samples.masked.format(mask=mask_token),
        first=samples.first,
        second=samples.second,
        hidden=model.hidden_size,
        trust=trust,
    )


def _notes(model: ModelConfig, dtype: ExportDtype, state: RunState) -> Iterator[str]:
    yield f"Tested with transformers {' and '.join(TESTED_RELEASES)}."
    if model.architecture == "retrievabert":
        yield (
            f"The code (`*.py`) is licensed under {_CODE_LICENSE}, whatever the licence of the "
            "weights."
        )
    yield (
        "Give `attention_mask` with padded batches. Either side may be padded; without "
        "`position_ids`,\n  padding changes no vector but for rounding."
    )
    trained, positions = state.longest_row, model.max_position_embeddings
    if trained is not None and trained < positions:
        yield _warning_of_length(model, trained, state.origin)
    if dtype == "bf16":
        yield (
            "The weights are bfloat16, rounded from the float32 that was trained. transformers 5 "
            'computes in\n  that type, 4 in float32 unless it is given `dtype="auto"`; with '
            "`dtype=torch.float32` both compute in float32."
        )
    else:
        yield (
            "The weights are float32, as they were trained; `dtype=torch.bfloat16` halves their "
            "memory and\n  computes to two or three digits."
        )


def _warning_of_length(model: ModelConfig, trained: int, origin: str | None) -> str:
    positions = model.max_position_embeddings
    rows = f"**Rows of training had at most {trained:,} tokens**, of {positions:,}"
    if model.family.rotary:
        return (
            f"{rows} that the configuration allows.\n  Longer texts are untried; cut them "
            f"(`truncation=True, max_length={trained}`), or fine-tune at their length."
        )
    if origin is not None:
        return (
            f"{rows} positions. Positions from {trained:,} on are random\n  unless those who "
            f"trained `{origin}` reached them; if not, cut texts (`truncation=True, "
            f"max_length={trained}`)."
        )
    return (
        f"{rows} positions. Those from {trained:,} on are random\n  until fine-tuning reaches "
        f"them. The tokenizer's `model_max_length` is {trained:,}: `truncation=True` cuts there."
    )


def _architecture(
    model: ModelConfig, vocab_size: int, num_pieces: int, dtype: ExportDtype, num_parameters: int
) -> Iterator[tuple[str, str]]:
    family = model.family
    gate = {"silu": "SwiGLU", "gelu": "GEGLU"}[family.activation]
    biases = "with biases" if family.biases else "without biases"
    yield "parameters", f"{num_parameters:,}"
    yield "layers", f"{model.num_layers}"
    yield "hidden size", f"{model.hidden_size:,}"
    yield "feed-forward size", f"{model.ffn_hidden_size:,} ({gate}, {biases})"
    yield "attention heads", f"{model.num_attention_heads}"
    yield "key/value heads", f"{model.num_query_groups}"
    if family.rotary:
        yield (
            "positions",
            f"{model.max_position_embeddings:,}, rotary (bases {model.rope_theta:g}, in local "
            f"layers {model.local_rope_theta:g})",
        )
        yield (
            "attention",
            f"one layer in {model.global_attention_every} sees all, the others "
            f"{model.local_attention // 2} tokens to each side",
        )
    else:
        yield "positions", f"{model.max_position_embeddings:,}, learned"
    spare = vocab_size - num_pieces
    padding = f"{num_pieces:,} pieces and {spare:,} spare rows that no text reaches"
    rows = f"{vocab_size:,} rows" + (f" ({padding})" if spare else "")
    yield "vocabulary", f"{rows}, tied with the decoder"
    yield "norm", f"LayerNorm before each sub-layer and at the end, epsilon {model.norm_eps}"
    yield (
        "dropout",
        f"{model.hidden_dropout:g} (hidden), {model.attention_dropout:g} (attention)",
    )
    yield "weights", torch_name(dtype)
