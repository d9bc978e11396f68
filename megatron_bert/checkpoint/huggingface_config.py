"""The model's shape as `config.json` has it, both ways, under RetrievaBERT's published keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ValidationError

from megatron_bert.config.errors import CheckpointError
from megatron_bert.config.schema import ModelConfig

ExportDtype = Literal["fp32", "bf16"]

CONFIG_NAME = "config.json"
MODEL_TYPE = "retrieva-bert"
_PACKAGE = "megatron_bert.huggingface"
_CONFIGURATION, _MODELING = "configuration_retrieva_bert", "modeling_retrieva_bert"
_TORCH_NAMES: Mapping[ExportDtype, str] = MappingProxyType({"fp32": "float32", "bf16": "bfloat16"})

# Their keys, in their order, and ours.
_SIZES = MappingProxyType(
    {
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "max_position_embeddings",
    }
)
_RATES = MappingProxyType(
    {
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "init_std",
        "layer_norm_eps": "norm_eps",
    }
)
# What the architecture leaves no choice in; a configuration may leave these keys out.
_FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_act": "silu",
        "mlp_bias": True,
        "lm_head_hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "type_vocab_size": 0,
        "tie_word_embeddings": True,
    }
)


@dataclass(frozen=True)
class ReadConfig:
    """What a `config.json` says.

    Attributes:
        model: the shape; `vocab_size` is set.
        pad_token_id: id of the padding token, None where it is not said.
        dtype: type of the weights in PyTorch's words, None where it is not said.
    """

    model: ModelConfig
    pad_token_id: int | None
    dtype: str | None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size


def modeling_code() -> dict[str, bytes]:
    """The files of modeling code that an export carries, by name."""
    files = resources.files(_PACKAGE).iterdir()
    names = sorted(file.name for file in files if re.fullmatch(r"(?!__)\w+\.py", file.name))
    return {name: (resources.files(_PACKAGE) / name).read_bytes() for name in names}


def huggingface_config(
    model: ModelConfig, vocab_size: int, dtype: ExportDtype, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        model: the encoder's shape.
        vocab_size: rows of the embedding table, padding included.
        dtype: type of the written weights.
        token_ids: `pad_token_id`, `bos_token_id` and `eos_token_id`.
    """
    return {
        "architectures": ["RetrievaBertForMaskedLM"],
        "auto_map": _auto_map(),
        "model_type": MODEL_TYPE,
        "vocab_size": vocab_size,
        **{theirs: getattr(model, ours) for theirs, ours in (_SIZES | _RATES).items()},
        **_FIXED,
        "torch_dtype": _TORCH_NAMES[dtype],
        **{key: token_ids[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def read_config(directory: Path) -> ReadConfig:
    """Read the `config.json` of a Hugging Face directory.

    Raises:
        CheckpointError: it is missing, no JSON, or of another architecture than this project
            trains; every field in question is named with its value.
    """
    path = directory / CONFIG_NAME
    content = read_object(path, "name a directory that transformers has saved a model in")
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path}: model_type is {content.get('model_type')!r}, expected {MODEL_TYPE!r}; only "
            "RetrievaBERT's architecture can be converted"
        )
    problems = [
        f"{path}: {key} is {content[key]!r}, but the training model has {value!r} only"
        for key, value in _FIXED.items()
        if content.get(key, value) != value
    ]
    needed = ("vocab_size", *_SIZES)
    problems += [f"{path}: {key} is missing" for key in needed if key not in content]
    if problems:
        raise CheckpointError("\n".join(problems))
    return ReadConfig(_shape(content, path), content.get("pad_token_id"), _dtype(content))


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: it is missing, cannot be read or is something else; `remedy` is added.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object; {remedy}")
    return content


def _shape(content: Mapping[str, Any], path: Path) -> ModelConfig:
    names = {"vocab_size": "vocab_size", **_SIZES, **_RATES}
    keys = {ours: content[theirs] for theirs, ours in names.items() if theirs in content}
    try:
        model = ModelConfig.model_validate(keys)
    except ValidationError as error:
        theirs = {ours: name for name, ours in names.items()}
        raise CheckpointError(
            "\n".join(
                f"{path}: {theirs[str(found['loc'][0])]} is {found['input']!r}; {found['msg']}"
                for found in error.errors()
            )
        ) from error
    for whole, part in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if content[whole] % content[part]:
            raise CheckpointError(
                f"{path}: {whole} is {content[whole]}, not a multiple of {part}, {content[part]}"
            )
    return model


def _dtype(content: Mapping[str, Any]) -> str | None:
    # transformers 5 writes the first, 4 the second.
    found = content.get("dtype", content.get("torch_dtype"))
    return None if found is None else str(found)


def _auto_map() -> dict[str, str]:
    """The Auto classes of what the modeling code defines."""
    code = (resources.files(_PACKAGE) / f"{_MODELING}.py").read_text("utf-8")
    heads = re.findall(r"^class RetrievaBert(For\w+)\(", code, re.MULTILINE)
    return {
        "AutoConfig": f"{_CONFIGURATION}.RetrievaBertConfig",
        "AutoModel": f"{_MODELING}.RetrievaBertModel",
        **{f"AutoModel{head}": f"{_MODELING}.RetrievaBert{head}" for head in heads},
    }
