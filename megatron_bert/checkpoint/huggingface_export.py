"""A training checkpoint as a directory that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_bert.checkpoint.huggingface_names import huggingface_name
from megatron_bert.checkpoint.manifest import reading_state, verified_manifest
from megatron_bert.checkpoint.tensors import read_whole, saved_shapes
from megatron_bert.config.errors import CheckpointError, DataError
from megatron_bert.config.places import check_place
from megatron_bert.config.schema import ModelConfig
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_export import export_tokenizer
from megatron_bert.files import sync_to_disk, temporary_path

ExportDtype = Literal["fp32", "bf16"]

_DTYPES: Mapping[ExportDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MODEL_PREFIX = "model."
_CODE = ("configuration_retrieva_bert.py", "modeling_retrieva_bert.py")


def export_checkpoint(
    checkpoint: Path, output: Path, dtype: ExportDtype = "fp32", tokenizer: Path | None = None
) -> None:
    """Write `output`: configuration, modeling code, weights and tokenizer of a checkpoint.

    The directory appears whole or not at all; the checkpoint is verified first.

    Args:
        checkpoint: a checkpoint's folder (`step_00001234`), saved under any layout.
        output: the directory to make; it must not exist yet, or be empty.
        dtype: type of the written weights.
        tokenizer: the tokenizer's file; default: the path in the checkpoint's configuration.

    Raises:
        UserError: `output` climbs out by `..`.
        CheckpointError: the checkpoint is missing or damaged, or `output` cannot be made.
        DataError: the tokenizer is missing or is not the one that the run was trained with.
    """
    check_place(output)
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists already; name a new directory, or remove it first")
    manifest = verified_manifest(checkpoint)
    with reading_state(checkpoint):
        run_config: Any = manifest.state["config"]
        tokenizer_path = tokenizer or Path(run_config["data"]["tokenizer"])
        trained_hash = str(manifest.state["tokenizer_hash"])
        model_keys = run_config["model"]
    _check_tokenizer(tokenizer_path, trained_hash, checkpoint)
    model = _model_config(model_keys, checkpoint)
    exported = export_tokenizer(tokenizer_path, model.max_position_embeddings)
    shapes = _model_shapes(checkpoint)
    vocab_size = shapes["embeddings.word.weight"][0]
    config = huggingface_config(model, vocab_size, dtype, exported.token_ids)
    staging = temporary_path(output)
    try:
        staging.mkdir(parents=True)
        tensors = dict(_renamed(checkpoint, shapes, _DTYPES[dtype]))
        weights, settings = staging / "model.safetensors", staging / "config.json"
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        # safetensors lets nobody but the owner read its files.
        weights.chmod(settings.stat().st_mode)
        for name, text in exported.files.items():
            (staging / name).write_text(text, "utf-8")
        code = resources.files("megatron_bert.huggingface")
        for name in _CODE:
            (staging / name).write_bytes((code / name).read_bytes())
        for path in staging.iterdir():
            sync_to_disk(path)
        staging.replace(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {output}: {error}; free space or name another place"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_to_disk(output.parent)


def huggingface_config(
    model: ModelConfig, vocab_size: int, dtype: ExportDtype, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The content of `config.json`, under RetrievaBERT's published keys."""
    return {
        "architectures": ["RetrievaBertForMaskedLM"],
        "auto_map": {
            "AutoConfig": "configuration_retrieva_bert.RetrievaBertConfig",
            "AutoModel": "modeling_retrieva_bert.RetrievaBertModel",
            "AutoModelForMaskedLM": "modeling_retrieva_bert.RetrievaBertForMaskedLM",
        },
        "model_type": "retrieva-bert",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": "silu",
        "mlp_bias": True,
        "lm_head_hidden_act": "gelu",
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": "absolute",
        "type_vocab_size": 0,
        "initializer_range": model.init_std,
        "layer_norm_eps": model.norm_eps,
        "tie_word_embeddings": True,
        "torch_dtype": str(_DTYPES[dtype]).removeprefix("torch."),
        **{key: token_ids[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def _check_tokenizer(path: Path, trained_hash: str, checkpoint: Path) -> None:
    found = Tokenizer.load(path).hash
    if found != trained_hash:
        raise DataError(
            f"tokenizer {path} has the hash {found}, but {checkpoint} was trained with one of "
            f"{trained_hash}; name that one with --tokenizer"
        )


def _model_config(keys: Any, checkpoint: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(keys)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint}: the model's shape in its manifest cannot be read ({error}); use the "
            "version of this program that wrote it"
        ) from error


def _model_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters, by their names in the model."""
    shapes = {
        name.removeprefix(_MODEL_PREFIX): shape
        for name, shape in saved_shapes(checkpoint).items()
        if name.startswith(_MODEL_PREFIX)
    }
    if "embeddings.word.weight" not in shapes:
        raise CheckpointError(f"{checkpoint}: holds no model; name a checkpoint of a training run")
    return shapes


def _renamed(
    checkpoint: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        whole = read_whole(checkpoint, _MODEL_PREFIX + name, shape)
        yield huggingface_name(name), whole.to(dtype)
