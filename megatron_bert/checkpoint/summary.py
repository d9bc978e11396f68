"""What a checkpoint or a Hugging Face directory holds, in lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_bert.checkpoint.huggingface_config import CONFIG_NAME, read_config
from megatron_bert.checkpoint.huggingface_names import model_parameters
from megatron_bert.checkpoint.huggingface_weights import HuggingFaceWeights
from megatron_bert.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_bert.checkpoint.run_state import MODEL_PREFIX, RunState
from megatron_bert.checkpoint.tensors import saved_shapes
from megatron_bert.config.schema import ModelConfig


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is a directory of transformers rather than a checkpoint or a run."""
    return (folder / CONFIG_NAME).is_file() and not (folder / MANIFEST_NAME).is_file()


def describe_checkpoint(folder: Path, *, is_verified: bool) -> Iterator[str]:
    """Yield the lines that describe a training checkpoint.

    Args:
        folder: the checkpoint's folder.
        is_verified: whether its files were compared with the manifest, which a line says.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    manifest = Manifest.read(folder)
    state = RunState(folder, manifest.state)
    shapes = saved_shapes(folder)
    parameters = sum(math.prod(s) for name, s in shapes.items() if name.startswith(MODEL_PREFIX))
    size = sum(record.size for record in manifest.files.values())
    yield f"checkpoint  {folder}"
    yield f"step        {manifest.step:,}, {state.consumed_rows:,} rows consumed"
    yield f"model       {_shape(state.model)}; {parameters:,} parameters"
    yield f"tokenizer   {state.tokenizer}, SHA-256 {state.tokenizer_hash}"
    if state.is_imported:
        yield "saved by    from-hf: weights without an optimizer's moments"
    else:
        yield f"data        {'; '.join(state.data)}"
        yield f"saved by    {_layout(state)}"
    yield f"content     {len(shapes):,} tensors in {len(manifest.files)} files, {size:,} bytes"
    if is_verified:
        yield "intact      every size and checksum is the manifest's"
    else:
        yield "intact      not verified"


def describe_huggingface(directory: Path) -> Iterator[str]:
    """Yield the lines that describe a directory of transformers.

    Raises:
        CheckpointError: it is of another architecture, damaged, or has pickled weights.
    """
    config = read_config(directory)
    weights = HuggingFaceWeights(directory)
    problems = list(weights.problems(model_parameters(config.model, config.vocab_size)))
    size = sum(file.stat().st_size for file in weights.files)
    yield f"directory   {directory}, for transformers"
    yield f"model       {_shape(config.model)}; {weights.num_elements:,} parameters"
    yield f"vocabulary  {config.vocab_size:,} rows, padding is {config.pad_token_id}"
    yield (
        f"content     {', '.join(weights.dtypes)} in {len(weights.files)} files, {size:,} bytes; "
        f"config.json says {config.dtype or 'no type'}"
    )
    yield from (f"names       {problem}" for problem in problems)
    if not problems:
        yield "names       all and only the training model's: from-hf takes it"


def _shape(model: ModelConfig) -> str:
    return (
        f"{model.architecture}, {model.num_layers} layers, hidden {model.hidden_size:,}, "
        f"feed-forward {model.ffn_hidden_size:,}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} key/value heads, {model.max_position_embeddings:,} positions"
    )


def _layout(state: RunState) -> str:
    """Numbers of ranks along each axis, and what else the configuration says of these axes."""
    ranks = {axis: n for axis, n in state.topology.items() if axis != "keys"}
    keys = state.topology.get("keys", {})
    text = ", ".join(f"{axis} {n}" for axis, n in ranks.items())
    if keys.get("replicate", 1) > 1:
        text += f" ({keys['replicate']} copies)"
    if ranks.get("pipeline", 1) > 1 and "pipeline_schedule" in keys:
        text += f", schedule {keys['pipeline_schedule']}"
    if ranks.get("tensor", 1) > 1 and keys.get("sequence"):
        text += ", sequence parallel"
    return text
