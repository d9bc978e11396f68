"""A directory of transformers as a checkpoint that pretraining goes on from.

The checkpoint has the weights alone, at step 0: no optimizer has seen them here, so a run that
begins with them begins with fresh moments, as after a random start.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert.checkpoint.huggingface_config import CONFIG_NAME, ReadConfig, read_config
from megatron_bert.checkpoint.huggingface_names import (
    Parameter,
    listed,
    model_parameters,
    their_tensors,
)
from megatron_bert.checkpoint.huggingface_weights import HuggingFaceWeights
from megatron_bert.checkpoint.manifest import Manifest
from megatron_bert.checkpoint.new_directory import check_is_new, new_directory
from megatron_bert.checkpoint.run_state import MODEL_PREFIX, imported_state
from megatron_bert.checkpoint.shard_files import Piece, write_shard
from megatron_bert.checkpoint.store import MAX_FILE_BYTES
from megatron_bert.command_line.arguments import argument
from megatron_bert.config.schema import ModelConfig
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_export import plain_piece
from megatron_bert.errors import CheckpointError, DataError

TOKENIZER_NAME = "tokenizer.json"
# The logit bias of an added row: softmax gives the row no weight, so that predictions and gradients
# are the same as without it.
_ADDED_BIAS = -1e4
# The head that predicts masked words; a model for another task is saved without it.
_HEAD = "head."


def import_model(
    directory: Path,
    output: Path,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> ModelConfig:
    """Write `output`, a checkpoint of step 0 with the weights of a Hugging Face directory.

    It appears whole or not at all. Weights pass through memory one after another.

    Args:
        directory: holds `config.json` and safetensors.
        output: the checkpoint's folder, for `checkpoint.resume`; it must not exist yet, or be
            empty.
        tokenizer: the tokenizer that the run's data are made with; default: the directory's
            `tokenizer.json`. Both must have the same pieces.
        vocab_size: rows that the embedding table is to have, at least as many as the directory's;
            default: the directory's. Added rows do not change what the model computes.
        max_file_bytes: files are split at about this size.

    Returns:
        The model's shape.

    Raises:
        CheckpointError: the directory is of another architecture, damaged, or pickled; names are
            unknown or missing (all are listed); or `output` cannot be made.
        DataError: the tokenizer is missing, lacks a special piece or is not the model's.
    """
    check_is_new(output)
    config = read_config(directory)
    weights = HuggingFaceWeights(directory)
    parameters = model_parameters(config.model, config.vocab_size)
    problems = list(weights.problems(parameters))
    if problems:
        _check_has_head(directory, config, weights, parameters)
        raise CheckpointError(
            "\n".join(f"{directory}: {problem}" for problem in problems)
            + f"\ncopy {directory} again, or name one whose weights are those of its config.json"
        )
    path = directory / TOKENIZER_NAME if tokenizer is None else tokenizer
    known = _checked_tokenizer(path, directory, config)
    model = config.model.model_copy(
        update={"vocab_size": _vocabulary(config.vocab_size, vocab_size, directory)}
    )
    with new_directory(output) as staging:
        pieces = list(_pieces(weights, model, config))
        files = write_shard(staging, 1, pieces, max_file_bytes, lambda: None)
        Manifest(0, files, imported_state(model, path, known.hash)).write(staging)
    return model


def _check_has_head(
    directory: Path, config: ReadConfig, weights: HuggingFaceWeights, parameters: list[Parameter]
) -> None:
    """Refuse a model that was saved without the pretraining head, e.g. a classifier."""
    head = [parameter.theirs for parameter in parameters if parameter.name.startswith(_HEAD)]
    # A classifier of ModernBERT has a part of the head.
    missing = [name for name in head if not weights.holds(name)]
    is_another = missing and config.saved_as not in (None, config.head)
    if is_another or len(missing) == len(head):
        model = f"a {config.saved_as}" if is_another else "a model"
        raise CheckpointError(
            f"{directory}: holds {model} without the head that predicts masked words (missing: "
            f"{listed(missing)}), which pretraining goes on with; name a directory of a "
            f"{config.head}, such as the model that this one was fine-tuned from"
        )


def _pieces(weights: HuggingFaceWeights, model: ModelConfig, config: ReadConfig) -> Iterator[Piece]:
    assert model.vocab_size is not None
    added_rows = model.vocab_size - config.vocab_size
    for stacked in their_tensors(model_parameters(model, model.vocab_size)):
        first_row = 0
        for parameter in stacked.parts:
            yield Piece(
                MODEL_PREFIX + parameter.name,
                torch.float32,
                parameter.shape,
                (0,) * len(parameter.shape),
                partial(_read, weights, parameter, first_row, added_rows),
            )
            first_row += parameter.shape[0]


def _read(
    weights: HuggingFaceWeights, parameter: Parameter, first_row: int, added_rows: int
) -> Iterator[Tensor]:
    tensor = weights.read(parameter.theirs)
    if not parameter.has_vocabulary:
        yield tensor[first_row : first_row + parameter.shape[0]]
        return
    yield tensor
    if added_rows:
        fill = 0.0 if tensor.dim() > 1 else _ADDED_BIAS
        yield torch.full((added_rows, *tensor.shape[1:]), fill)


def _vocabulary(found: int, asked: int | None, directory: Path) -> int:
    if asked is not None and asked < found:
        raise CheckpointError(
            f"{argument('vocab_size', asked)}: {directory / CONFIG_NAME} has a vocab_size of "
            f"{found}; rows can be added, not taken away: give {found} or more"
        )
    return found if asked is None else asked


def _checked_tokenizer(path: Path, directory: Path, config: ReadConfig) -> Tokenizer:
    """Load the tokenizer of the run to come, which must have the pieces of the model's own."""
    own = directory / TOKENIZER_NAME
    if path == own and not own.is_file():
        raise DataError(
            f"tokenizer {own}: no such file; name the model's with {argument('tokenizer')}"
        )
    known = Tokenizer.load(path)
    if known.vocab_size > config.vocab_size:
        raise DataError(
            f"tokenizer {path} has {known.vocab_size} pieces, but {directory / CONFIG_NAME} a "
            f"vocab_size of {config.vocab_size}; name the model's own with {argument('tokenizer')}"
        )
    if config.pad_token_id not in (None, known.pad_id):
        raise DataError(
            f"tokenizer {path} pads with {known.pad_id}, but {directory / CONFIG_NAME} has a "
            f"pad_token_id of {config.pad_token_id}; name the model's own with "
            f"{argument('tokenizer')}"
        )
    if path != own and own.is_file():
        _check_same_pieces(known, path, Tokenizer.load(own), own)
    return known


def _check_same_pieces(first: Tokenizer, path: Path, second: Tokenizer, own: Path) -> None:
    if first.vocab_size != second.vocab_size:
        raise DataError(
            f"tokenizer {path} has {first.vocab_size} pieces, {own} {second.vocab_size}; name the "
            "one that the model was trained with"
        )
    for number in range(first.vocab_size):
        pieces = [plain_piece(one.id_to_piece(number)) for one in (first, second)]
        if pieces[0] != pieces[1]:
            raise DataError(
                f"tokenizer {path} has {pieces[0]!r} at {number}, {own} has {pieces[1]!r}; name "
                "the one that the model was trained with"
            )
