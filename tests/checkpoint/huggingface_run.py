"""A run with one checkpoint of a small model, for the tests of conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.load import config_dict
from megatron_bert.config.schema import Config
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.parallel.random import fill_normal
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, packed_inputs, small_config, whole_model

VOCABULARY = 512
STEP = 10


def make_run(folder: Path, tokenizer: Path, **model: Any) -> Path:
    """Fill `folder` with a run whose checkpoint has step 10; return the checkpoint's folder.

    Beside it lie `tiny.model`, the tokenizer, and `expected.pt`: the `logits` of the model's
    `inputs`, and its `parameters` by name. `model` are keys of the small model to change.
    """
    (folder / "tiny.model").write_bytes(tokenizer.read_bytes())
    run_ranks(1, _save, folder, model)
    return folder / "run" / "checkpoints" / f"step_{STEP:08d}"


def expected_parameters(folder: Path) -> dict[str, Tensor]:
    """What `make_run` has saved, by the names of the training model."""
    values: dict[str, Tensor] = torch.load(folder / "expected.pt")["parameters"]
    return values


def _save(folder: Path, model_keys: dict[str, Any]) -> None:
    config = small_config(data={"tokenizer": str(folder / "tiny.model")}, model=model_keys)
    model = _model(config)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    inputs = packed_inputs(3)
    with torch.no_grad():
        hidden = model.encode(inputs.tokens, inputs.positions, inputs.rows)
        hidden = hidden.unflatten(0, inputs.tokens.shape)
        logits = model.head.transform(hidden) @ model.embeddings.word.weight.T + model.head.bias
    torch.save(
        {"inputs": inputs._asdict(), "logits": logits, "parameters": parameters},
        folder / "expected.pt",
    )
    tensors = {f"model.{name}": tensor for name, tensor in parameters.items()}
    tensors["optim.head.bias.exp_avg"] = torch.zeros(VOCABULARY)
    CheckpointStore(folder / "run" / "checkpoints", keep=1).save(STEP, tensors, _state(config))


def _state(config: Config) -> dict[str, Any]:
    return {
        "step": STEP,
        "config": config_dict(config),
        "tokenizer_hash": Tokenizer.load(config.data.tokenizer).hash,
        "consumed_rows": 80,
        "data": ["300 documents"],
        "topology": {
            "pipeline": 2,
            "data": 4,
            "tensor": 1,
            "keys": {"replicate": 2, "pipeline_schedule": "interleaved", "sequence": False},
        },
    }


def _model(config: Config) -> BertForPretraining:
    """A model whose every parameter, biases and norms too, has values of its own."""
    model = whole_model(config, cpu_topology())
    model.embeddings.word.weight = nn.Parameter(torch.empty(VOCABULARY, config.model.hidden_size))
    model.head.bias = nn.Parameter(torch.empty(VOCABULARY))
    for name, parameter in model.named_parameters():
        fill_normal(
            parameter,
            global_shape=parameter.shape,
            offset=(0,) * parameter.dim(),
            std=0.2,
            seed=5,
            name=name,
        )
    return model.eval()
