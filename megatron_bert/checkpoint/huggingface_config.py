"""The model's shape as `config.json` has it, both ways, under each architecture's own keys."""

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

from megatron_bert.checkpoint.huggingface_modernbert import in_older_keys, newer_keys
from megatron_bert.config.architectures import ArchitectureName
from megatron_bert.config.schema import ModelConfig
from megatron_bert.errors import CheckpointError

ExportDtype = Literal["fp32", "bf16"]

CONFIG_NAME = "config.json"
_PACKAGE = "megatron_bert.huggingface"
_CONFIGURATION, _MODELING = "configuration_retrieva_bert", "modeling_retrieva_bert"
_TORCH_NAMES: Mapping[ExportDtype, str] = MappingProxyType({"fp32": "float32", "bf16": "bfloat16"})


@dataclass(frozen=True)
class _Dialect:
    """How a `config.json` expresses one architecture.

    Attributes:
        model_type: transformers' name of it.
        head: class of the masked-language model.
        sizes: transformers' keys of sizes, in their order, with ours; none may be missing.
        rates: likewise for keys that may be missing.
        defaults: transformers' defaults of `rates` where they differ from ours, by our keys.
        fixed: keys for which the architecture leaves no choice; a configuration may leave them out.
        heads: keys for heads put on the model, which say nothing of the model itself.
        tokens: special tokens whose ids it contains.
    """

    model_type: str
    head: str
    sizes: Mapping[str, str]
    rates: Mapping[str, str]
    defaults: Mapping[str, float]
    fixed: Mapping[str, Any]
    heads: Mapping[str, Any]
    tokens: tuple[str, ...]


_DIALECTS: Mapping[ArchitectureName, _Dialect] = MappingProxyType(
    {
        "retrievabert": _Dialect(
            "retrieva-bert",
            "RetrievaBertForMaskedLM",
            {
                "hidden_size": "hidden_size",
                "num_hidden_layers": "num_layers",
                "num_attention_heads": "num_attention_heads",
                "num_key_value_heads": "num_query_groups",
                "intermediate_size": "ffn_hidden_size",
                "max_position_embeddings": "max_position_embeddings",
            },
            {
                "hidden_dropout_prob": "hidden_dropout",
                "attention_probs_dropout_prob": "attention_dropout",
                "initializer_range": "init_std",
                "layer_norm_eps": "norm_eps",
            },
            {},
            {
                "hidden_act": "silu",
                "mlp_bias": True,
                "lm_head_hidden_act": "gelu",
                "position_embedding_type": "absolute",
                "type_vocab_size": 0,
                "tie_word_embeddings": True,
            },
            {},
            ("pad", "bos", "eos"),
        ),
        # In the keys of transformers 4; `newer_keys` adds those of 5.
        "modernbert": _Dialect(
            "modernbert",
            "ModernBertForMaskedLM",
            {
                "hidden_size": "hidden_size",
                "num_hidden_layers": "num_layers",
                "num_attention_heads": "num_attention_heads",
                "intermediate_size": "ffn_hidden_size",
                "max_position_embeddings": "max_position_embeddings",
                "local_attention": "local_attention",
                "global_attn_every_n_layers": "global_attention_every",
            },
            {
                # Where the two differ, the latter is the run's.
                "mlp_dropout": "hidden_dropout",
                "embedding_dropout": "hidden_dropout",
                "attention_dropout": "attention_dropout",
                "initializer_range": "init_std",
                "norm_eps": "norm_eps",
                "global_rope_theta": "rope_theta",
                "local_rope_theta": "local_rope_theta",
            },
            {"hidden_dropout": 0.0, "attention_dropout": 0.0, "norm_eps": 1e-5},
            {
                "hidden_activation": "gelu",
                "norm_bias": False,
                "attention_bias": False,
                "mlp_bias": False,
                "classifier_activation": "gelu",
                "classifier_bias": False,
                "decoder_bias": True,
                "tie_word_embeddings": True,
            },
            # CLS was not trained to stand for the text, but the library's default uses it alone.
            {"classifier_pooling": "mean"},
            ("pad", "bos", "eos", "cls", "sep"),
        ),
    }
)


@dataclass(frozen=True)
class ReadConfig:
    """What a `config.json` says.

    Attributes:
        model: the shape; `vocab_size` is set.
        pad_token_id: id of the padding token, None where it is not said.
        dtype: type of the weights in PyTorch's words, None where it is not said.
        saved_as: transformers' class of the saved model, None where it is not said.
        head: transformers' class of the model that pretraining goes on with.
    """

    model: ModelConfig
    pad_token_id: int | None
    dtype: str | None
    saved_as: str | None
    head: str

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size


def modeling_code(model: ModelConfig) -> dict[str, bytes]:
    """The files of modeling code that an export carries; none if transformers has the model."""
    if model.architecture != "retrievabert":
        return {}
    files = resources.files(_PACKAGE).iterdir()
    names = sorted(file.name for file in files if re.fullmatch(r"(?!__)\w+\.py", file.name))
    return {name: (resources.files(_PACKAGE) / name).read_bytes() for name in names}


def auto_map() -> dict[str, str]:
    """The Auto classes of what the modeling code defines."""
    code = (resources.files(_PACKAGE) / f"{_MODELING}.py").read_text("utf-8")
    heads = re.findall(r"^class RetrievaBert(For\w+)\(", code, re.MULTILINE)
    return {
        "AutoConfig": f"{_CONFIGURATION}.RetrievaBertConfig",
        "AutoModel": f"{_MODELING}.RetrievaBertModel",
        **{f"AutoModel{head}": f"{_MODELING}.RetrievaBert{head}" for head in heads},
    }


def huggingface_config(
    model: ModelConfig, vocab_size: int, dtype: ExportDtype, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        model: the encoder's shape.
        vocab_size: rows of the embedding table, padding included.
        dtype: type of the written weights.
        token_ids: `pad_token_id` and so on.
    """
    dialect = _DIALECTS[model.architecture]
    keys = {**dialect.sizes, **dialect.rates}
    return {
        "architectures": [dialect.head],
        **({"auto_map": auto_map()} if model.architecture == "retrievabert" else {}),
        "model_type": dialect.model_type,
        "vocab_size": vocab_size,
        **{theirs: getattr(model, ours) for theirs, ours in keys.items()},
        **(newer_keys(model) if model.architecture == "modernbert" else {}),
        **dialect.fixed,
        **dialect.heads,
        "torch_dtype": torch_name(dtype),
        **{f"{role}_token_id": token_ids[f"{role}_token_id"] for role in dialect.tokens},
    }


def torch_name(dtype: ExportDtype) -> str:
    """A type in PyTorch's words."""
    return _TORCH_NAMES[dtype]


def read_config(directory: Path) -> ReadConfig:
    """Read the `config.json` of a Hugging Face directory.

    Raises:
        CheckpointError: it is missing, no JSON, or of another architecture than this project
            trains; every field in question is named with its value.
    """
    path = directory / CONFIG_NAME
    content = read_object(path, "name a directory that transformers has saved a model in")
    architecture = _architecture(content, path)
    dialect = _DIALECTS[architecture]
    problems: list[str] = []
    if architecture == "modernbert":
        content, problems = in_older_keys(content)
    problems += [
        f"{key} is {content[key]!r}, but the training model has {value!r} only"
        for key, value in dialect.fixed.items()
        if content.get(key, value) != value
    ]
    needed = ("vocab_size", *dialect.sizes)
    problems += [
        f"{key} is {'null' if key in content else 'missing'}"
        for key in needed
        if content.get(key) is None
    ]
    if problems:
        raise CheckpointError(
            "\n".join(f"{path}: {problem}" for problem in problems)
            + "\nname a directory whose model the training model can be, as it stands"
        )
    model = _shape(content, architecture, path)
    return ReadConfig(
        model, content.get("pad_token_id"), _dtype(content), _saved_as(content), dialect.head
    )


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


def _architecture(content: Mapping[str, Any], path: Path) -> ArchitectureName:
    model_type = content.get("model_type")
    for name, dialect in _DIALECTS.items():
        if dialect.model_type == model_type:
            return name
    expected = " or ".join(repr(dialect.model_type) for dialect in _DIALECTS.values())
    raise CheckpointError(
        f"{path}: model_type is {model_type!r}, expected {expected}; no other architecture can be "
        "converted; name a directory of one of these"
    )


def _shape(content: Mapping[str, Any], architecture: ArchitectureName, path: Path) -> ModelConfig:
    dialect = _DIALECTS[architecture]
    names = {"vocab_size": "vocab_size", **dialect.sizes, **dialect.rates}
    given = {ours: content[theirs] for theirs, ours in names.items() if theirs in content}
    keys = {**dialect.defaults, **given}
    # Where they have no key for it, each head has keys and values of its own.
    keys.setdefault("num_query_groups", keys["num_attention_heads"])
    try:
        model = ModelConfig.model_validate({"architecture": architecture, **keys})
    except ValidationError as error:
        theirs = {ours: name for name, ours in names.items()}
        raise CheckpointError(
            "\n".join(
                f"{path}: {theirs.get(str(found['loc'][0]), found['loc'][0])} is "
                f"{found['input']!r}; {found['msg']}"
                for found in error.errors()
            )
            + "\ncopy the directory again, or name another"
        ) from error
    for whole, part in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_query_groups"),
    ):
        if getattr(model, whole) % getattr(model, part):
            theirs_part = {ours: name for name, ours in names.items()}.get(part, part)
            raise CheckpointError(
                f"{path}: {whole} is {getattr(model, whole)}, not a multiple of {theirs_part}, "
                f"{getattr(model, part)}; copy the directory again, or name another"
            )
    return model


def _dtype(content: Mapping[str, Any]) -> str | None:
    # transformers 5 writes the first, 4 the second.
    found = content.get("dtype", content.get("torch_dtype"))
    return None if found is None else str(found)


def _saved_as(content: Mapping[str, Any]) -> str | None:
    match content.get("architectures"):
        case [str(name)]:
            return name
    return None
