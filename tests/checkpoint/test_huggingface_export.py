from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.huggingface_names import huggingface_name
from megatron_bert.checkpoint.store import CheckpointStore, find_checkpoint
from megatron_bert.config.errors import CheckpointError, DataError
from megatron_bert.config.load import config_dict
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.parallel.random import fill_normal
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, packed_inputs, small_config, whole_model

CHECKOUT = Path(__file__).resolve().parents[2]
VOCABULARY = 512


def _model(folder: Path) -> BertForPretraining:
    """A model whose every parameter, biases and norms too, makes a difference."""
    config = small_config(data={"tokenizer": str(folder / "tiny.model")})
    topology = cpu_topology()
    model = whole_model(config, topology)
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


def _save(folder: Path, model: BertForPretraining) -> None:
    config = small_config(data={"tokenizer": str(folder / "tiny.model")})
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors["optim.head.bias.exp_avg"] = torch.zeros(VOCABULARY)
    state = {
        "config": config_dict(config),
        "tokenizer_hash": Tokenizer.load(folder / "tiny.model").hash,
        "consumed_rows": 80,
        "data": ["300 documents"],
        "topology": {"pipeline": 1, "data": 1, "tensor": 1},
    }
    CheckpointStore(folder / "run" / "checkpoints", keep=1).save(10, tensors, state)


def _save_with_logits(folder: Path) -> None:
    model = _model(folder)
    inputs = packed_inputs(3)
    with torch.no_grad():
        hidden = model.encode(inputs["tokens"], inputs["positions"], inputs["rows"])
        hidden = hidden.unflatten(0, inputs["tokens"].shape)
        logits = model.head.transform(hidden) @ model.embeddings.word.weight.T + model.head.bias
    torch.save({"inputs": inputs, "logits": logits}, folder / "expected.pt")
    _save(folder, model)


@pytest.fixture(scope="module")
def run_folder(tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a run that has one checkpoint, and the logits of its model."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "tiny.model").write_bytes(tiny_tokenizer_path.read_bytes())
    run_ranks(1, _save_with_logits, folder)
    return folder


@pytest.fixture(scope="module")
def exported(run_folder: Path) -> Path:
    output = run_folder / "huggingface"
    export_checkpoint(find_checkpoint(run_folder / "run"), output)
    return output


# A process of its own, in which the package is not importable: an export must stand alone.
LOAD = """
import sys, torch
assert not [name for name in sys.modules if name.startswith("megatron_bert")]
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline
folder, expected = sys.argv[1], torch.load(sys.argv[2])
inputs, logits = expected["inputs"], expected["logits"]
for attention in ("eager", "sdpa"):
    model = AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention).eval()
    with torch.no_grad():
        found = model(inputs["tokens"].long(), position_ids=inputs["positions"].long()).logits
    difference = (found - logits).abs().max().item() / logits.abs().max().item()
    assert difference < 1e-5, (attention, difference)
    alone = model(inputs["tokens"][:1, :5].long()).logits
    padded = torch.cat([inputs["tokens"][:1, :5].long(), torch.full((1, 3), 4)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    beside = model(padded, attention_mask=mask).logits[:, :5]
    assert torch.allclose(alone, beside, atol=1e-4), attention
assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert base(inputs["tokens"].long()).last_hidden_state.shape == (3, inputs["tokens"].shape[1], 32)
model.save_pretrained(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert tokenizer.mask_token == "<MASK>" and tokenizer.mask_token_id == 3, tokenizer.mask_token
fill = pipeline("fill-mask", folder, tokenizer=tokenizer, trust_remote_code=True)
guesses = fill("吾輩は<MASK>である")
assert len(guesses) == 5 and all(0 <= guess["score"] <= 1 for guess in guesses)
"""


def test_transformers_alone_gives_the_training_models_logits_and_fills_masks(
    run_folder: Path, exported: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-I", "-c", LOAD]
    result = subprocess.run(
        [*command, exported, run_folder / "expected.pt", tmp_path / "again"],
        env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    saved = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(tensor, saved[name]), name


def test_every_parameter_is_exported_once_under_its_name(run_folder: Path, exported: Path) -> None:
    ours = _parameters(run_folder)
    theirs = load_file(exported / "model.safetensors")
    assert sorted(map(huggingface_name, ours)) == sorted(theirs)
    for name, tensor in ours.items():
        assert torch.equal(theirs[huggingface_name(name)], tensor), name


def _parameters(folder: Path) -> dict[str, Tensor]:
    run_ranks(1, _write_parameters, folder)
    values: dict[str, Tensor] = torch.load(folder / "parameters.pt")
    return values


def _write_parameters(folder: Path) -> None:
    values = {name: p.detach() for name, p in _model(folder).named_parameters()}
    torch.save(values, folder / "parameters.pt")


def test_the_configuration_has_the_published_keys(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "retrieva-bert"
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (4, 1, 2)
    assert config["vocab_size"] == VOCABULARY
    assert config["num_key_value_heads"] == 1
    assert config["intermediate_size"] == 48


def test_whoever_may_read_the_configuration_may_read_the_weights(exported: Path) -> None:
    modes = {path.stat().st_mode for path in exported.iterdir()}
    assert len(modes) == 1


def test_bf16_halves_the_weights(run_folder: Path, tmp_path: Path, exported: Path) -> None:
    export_checkpoint(find_checkpoint(run_folder / "run"), tmp_path / "half", "bf16")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    for name, whole in load_file(exported / "model.safetensors").items():
        assert torch.equal(weights[name], whole.bfloat16())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_directory_that_holds_something_is_left_alone(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(find_checkpoint(run_folder / "run"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_another_tokenizer_than_the_runs_is_refused_with_both_hashes(
    run_folder: Path, tmp_path: Path, tiny_texts: list[str]
) -> None:
    from megatron_bert.data.tokenizer_training import train_tokenizer, write_model

    other = tmp_path / "other.model"
    write_model(train_tokenizer(tiny_texts, 500), other)
    with pytest.raises(DataError, match=r"has the hash .* trained with one of .*--tokenizer"):
        export_checkpoint(find_checkpoint(run_folder / "run"), tmp_path / "out", tokenizer=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_what_is_no_checkpoint_is_refused_with_a_remedy(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="name a complete checkpoint"):
        find_checkpoint(tmp_path / place)


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CHECKOUT / "tools" / "convert_checkpoint.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_the_tool_exports_inspects_and_refuses(run_folder: Path, tmp_path: Path) -> None:
    shown = _tool("inspect", run_folder / "run")
    assert shown.returncode == 0, shown.stderr
    assert "step        10, 80 rows" in shown.stdout
    made = _tool("to-hf", "--checkpoint", run_folder / "run", "--output", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "out" / "modeling_retrieva_bert.py").is_file()
    refused = _tool("to-hf", "--checkpoint", tmp_path / "none", "--output", tmp_path / "other")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
