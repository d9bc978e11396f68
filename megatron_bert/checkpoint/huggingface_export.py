"""A training checkpoint as a directory that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.checkpoint.huggingface_card import model_card
from megatron_bert.checkpoint.huggingface_card_training import RunFigures
from megatron_bert.checkpoint.huggingface_config import (
    CONFIG_NAME,
    ExportDtype,
    huggingface_config,
    modeling_code,
)
from megatron_bert.checkpoint.huggingface_names import (
    Parameter,
    TheirTensor,
    listed,
    model_parameters,
    their_tensors,
)
from megatron_bert.checkpoint.huggingface_weights import WEIGHTS_NAME
from megatron_bert.checkpoint.manifest import Manifest, verified_manifest
from megatron_bert.checkpoint.new_directory import check_is_new, new_directory
from megatron_bert.checkpoint.run_state import MODEL_PREFIX, RunState
from megatron_bert.checkpoint.shard_files import Piece, write_file
from megatron_bert.checkpoint.tensors import read_whole_tensors, saved_shapes
from megatron_bert.command_line.arguments import argument
from megatron_bert.config.schema import ModelConfig
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_export import export_tokenizer
from megatron_bert.errors import CheckpointError, DataError
from megatron_bert.files import write_durably

_DTYPES: Mapping[ExportDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WORD = "embeddings.word.weight"


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    dtype: ExportDtype = "fp32",
    tokenizer: Path | None = None,
    *,
    figures: RunFigures | None = None,
    license_id: str = "unknown",
    languages: Sequence[str] = (),
    is_verified: bool = False,
) -> None:
    """Write `output`: configuration, modeling code, weights, tokenizer and card of a checkpoint.

    The directory appears whole or not at all; the checkpoint is verified first, unless
    it has just been. Weights pass through memory one after another (`read_whole_tensors`).

    Args:
        checkpoint: a checkpoint's folder (`step_00001234`), saved under any layout.
        output: the directory to make; it must not exist yet, or be empty.
        dtype: type of the written weights.
        tokenizer: the tokenizer's file; default: the path in the checkpoint's configuration.
        figures: what the run measured until then, for the card; None if that is not known.
        license_id: the licence of the weights, for the card.
        languages: ISO 639 codes, for the card.
        is_verified: whether `find_checkpoint` has just verified the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or `output` cannot be made.
        DataError: the tokenizer is missing or is not the one that the run was trained with.
    """
    check_is_new(output)
    manifest = Manifest.read(checkpoint) if is_verified else verified_manifest(checkpoint)
    state = RunState(checkpoint, manifest.state)
    tokenizer = state.tokenizer if tokenizer is None else tokenizer
    num_pieces = _checked_tokenizer(tokenizer, state).vocab_size
    model, shapes = state.model, _model_shapes(checkpoint)
    vocab_size = shapes[_WORD][0]
    parameters = _checked_parameters(checkpoint, model, vocab_size, shapes)
    exported = export_tokenizer(tokenizer, _longest_text(model, state))
    config = huggingface_config(model, vocab_size, dtype, exported.token_ids)
    with state.reading():
        card = model_card(
            model,
            vocab_size,
            dtype,
            num_pieces=num_pieces,
            num_parameters=sum(parameter.size for parameter in parameters),
            mask_token=exported.mask_token,
            state=state,
            figures=figures,
            license_id=license_id,
            languages=languages,
        )
    small_files: dict[str, str | bytes] = {
        CONFIG_NAME: json.dumps(config, indent=2) + "\n",
        "README.md": card,
        **exported.files,
        **modeling_code(model),
    }
    with new_directory(output) as staging:
        for name, content in small_files.items():
            write_durably(staging / name, content)
        pieces = list(_pieces(checkpoint, parameters, _DTYPES[dtype]))
        write_file(staging / WEIGHTS_NAME, pieces, lambda: None, with_places=False)


def _checked_tokenizer(path: Path, state: RunState) -> Tokenizer:
    found = Tokenizer.load(path)
    if found.hash != state.tokenizer_hash:
        raise DataError(
            f"tokenizer {path} has the hash {found.hash}, but {state.folder} was trained with one "
            f"of {state.tokenizer_hash}; name that one with {argument('tokenizer')}"
        )
    return found


def _longest_text(model: ModelConfig, state: RunState) -> int:
    """Tokens at which the tokenizer cuts texts.

    A learned position that no training row reached is random. A rotary one is computed like any
    other, and what another run has trained is not known here: in these cases only the table is the
    limit.
    """
    trained = state.longest_row
    if model.family.rotary or trained is None or state.origin is not None:
        return model.max_position_embeddings
    return min(trained, model.max_position_embeddings)


def _model_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters, by their names in the model."""
    shapes = {
        name.removeprefix(MODEL_PREFIX): shape
        for name, shape in saved_shapes(checkpoint).items()
        if name.startswith(MODEL_PREFIX)
    }
    if _WORD not in shapes:
        raise CheckpointError(f"{checkpoint}: holds no model; name a checkpoint of a training run")
    return shapes


def _checked_parameters(
    checkpoint: Path, model: ModelConfig, vocab_size: int, shapes: Mapping[str, tuple[int, ...]]
) -> list[Parameter]:
    """The model's parameters, which must be those that the checkpoint holds."""
    parameters = model_parameters(model, vocab_size)
    expected = {parameter.name: parameter.shape for parameter in parameters}
    wrong = {
        "missing": [name for name in expected if name not in shapes],
        "unknown": [name for name in shapes if name not in expected],
        "of another shape than its manifest says": [
            name for name, shape in expected.items() if shapes.get(name, shape) != shape
        ],
    }
    if any(wrong.values()):
        raise CheckpointError(
            f"{checkpoint}: cannot be converted: "
            + "; ".join(f"{what}: {listed(names)}" for what, names in wrong.items() if names)
            + "; use the version of this program that wrote it, or another checkpoint"
        )
    return parameters


def _pieces(checkpoint: Path, parameters: list[Parameter], dtype: torch.dtype) -> Iterator[Piece]:
    """The file's tensors, each read when its turn to be written comes."""
    shapes = {MODEL_PREFIX + parameter.name: parameter.shape for parameter in parameters}
    # All have one dtype, so they are written in the order in which they are read.
    wholes = read_whole_tensors(checkpoint, shapes)

    def resolve(tensor: TheirTensor) -> Iterator[Tensor]:
        for _ in tensor.parts:
            yield next(wholes).to(dtype)

    for tensor in their_tensors(parameters):
        offset = (0,) * len(tensor.shape)
        yield Piece(tensor.name, dtype, tensor.shape, offset, partial(resolve, tensor))
