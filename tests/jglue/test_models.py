"""Directories of models: what is loaded, what is refused, and that no code in them is executed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bert.errors import DataError
from megatron_bert.huggingface.modeling_retrieva_bert import RetrievaBertForMultipleChoice
from megatron_bert.jglue.models import ModelSource
from megatron_bert.jglue.recipes import RECIPES

CODE = ("configuration_retrieva_bert.py", "modeling_retrieva_bert.py")


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the exported model, to be damaged."""
    return shutil.copytree(models["exported"], tmp_path / "copy")


def _change(path: Path, **keys: Any) -> None:
    content = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize("name", ["exported", "bert"])
def test_the_encoder_is_the_directorys_and_the_head_comes_from_the_seed(
    models: dict[str, Path], name: str, task: str
) -> None:
    source, recipe = ModelSource(models[name]), RECIPES[task]
    source.check()
    loaded = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded.append(source.load_model(recipe).state_dict())
    stored = load_file(models[name] / "model.safetensors")
    shared = [key for key in stored if key in loaded[0] and key.startswith("bert.")]
    assert len(shared) > 20
    for key in shared:
        torch.testing.assert_close(loaded[0][key], stored[key], rtol=0, atol=0)
    heads = [torch.cat([w.flatten() for k, w in m.items() if k not in stored]) for m in loaded]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


def test_weights_can_be_left(models: dict[str, Path]) -> None:
    source = ModelSource(models["exported"], random_weights=True)
    source.check()
    torch.manual_seed(1)
    random = source.load_model(RECIPES["jsts"]).state_dict()
    stored = load_file(models["exported"] / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    assert random[name].shape == stored[name].shape
    assert not random[name].equal(stored[name])


def test_weights_in_bf16_are_trained_in_fp32(copy: Path) -> None:
    stored = {k: w.bfloat16() for k, w in load_file(copy / "model.safetensors").items()}
    save_file(stored, copy / "model.safetensors", {"format": "pt"})
    _change(copy / "config.json", dtype="bfloat16")
    source = ModelSource(copy)
    source.check()
    assert {w.dtype for w in source.load_model(RECIPES["jnli"]).parameters()} == {torch.float32}


def test_code_in_a_directory_is_executed_only_by_leave(copy: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    for name in (*CODE, "tokenization_retrieva_bert.py", "__init__.py"):
        (copy / name).write_text(f"import os\nos.makedirs({str(trace)!r}, exist_ok=True)\n")
    source, recipe = ModelSource(copy), RECIPES["jcommonsenseqa"]
    source.check()
    source.load_tokenizer(recipe, 64)
    assert type(source.load_model(recipe)) is RetrievaBertForMultipleChoice
    assert not trace.exists()
    _change(copy / "config.json", model_type="another")
    with pytest.raises(DataError, match="--trust-remote-code to execute the code"):
        source.load_model(recipe)
    assert not trace.exists()
    assert "modeling_retrieva_bert.py" in source.fingerprint()


def _load(source: ModelSource, task: str, length: int) -> None:
    source.check()
    source.load_tokenizer(RECIPES[task], length)
    source.load_model(RECIPES[task])


def _refused(source: Path, task: str = "jsts", length: int = 64) -> str:
    """What is said of a directory, up to the loading of the model."""
    with pytest.raises(DataError) as caught:
        _load(ModelSource(source), task, length)
    assert str(source) in str(caught.value)
    return str(caught.value)


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in _refused(tmp_path)
    assert "holds no config.json" in _refused(tmp_path / "nowhere")


def test_a_model_without_tokenizer_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    # transformers makes one of five special tokens for such a BERT.
    bare = shutil.copytree(models["bert"], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "holds no tokenizer (none of tokenizer.json" in _refused(bare)


@pytest.mark.parametrize("name", ["cls_token", "sep_token", "pad_token"])
def test_a_tokenizer_that_lacks_a_special_token_is_refused(copy: Path, name: str) -> None:
    _change(copy / "tokenizer_config.json", **{name: None})
    assert f"the tokenizer has no {name}" in _refused(copy)


def test_a_damaged_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be loaded" in _refused(copy)


def test_inputs_longer_than_the_model_are_refused(copy: Path) -> None:
    told = _refused(copy, length=65)
    assert "max_position_embeddings = 64" in told
    assert "give --max-length 64 or less" in told


def test_missing_and_damaged_weights_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    assert "its model cannot be loaded" in _refused(copy)
    weights.write_bytes(content[: len(content) // 2])
    assert "its model cannot be loaded" in _refused(copy)


def test_weights_that_are_not_the_encoders_are_refused(copy: Path) -> None:
    stored = load_file(copy / "model.safetensors")
    name = "bert.encoder.layer.1.attention.self.query.weight"
    stored["other.weight"] = stored.pop(name)
    save_file(stored, copy / "model.safetensors", {"format": "pt"})
    told = _refused(copy)
    assert "lack 1 of the encoder's parameters" in told
    assert name in told


def test_an_architecture_without_the_head_is_refused(tmp_path: Path, copy: Path) -> None:
    shutil.copy(copy / "tokenizer.json", tmp_path)
    shutil.copy(copy / "tokenizer_config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "its model cannot be loaded (Unrecognized configuration class" in _refused(tmp_path)
