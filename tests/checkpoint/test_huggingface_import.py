from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.huggingface_import import import_model
from megatron_bert.checkpoint.huggingface_names import listed
from megatron_bert.checkpoint.manifest import Manifest, verified_manifest
from megatron_bert.checkpoint.store import find_checkpoint
from megatron_bert.checkpoint.tensors import read_whole_tensors, saved_shapes
from megatron_bert.config.identity import check_resume
from megatron_bert.config.schema import Config
from megatron_bert.data.tokenizer_training import train_tokenizer, write_model
from megatron_bert.errors import CheckpointError, ConfigError, DataError
from tests.checkpoint.huggingface_run import VOCABULARY, expected_parameters, make_run
from tests.distributed_harness import run_ranks
from tests.training.runs import run_config, steps_of, train

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def run_folder(tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import")
    export_checkpoint(make_run(folder, tiny_tokenizer_path), folder / "exported")
    return folder


@pytest.fixture
def directory(run_folder: Path, tmp_path: Path) -> Path:
    """A Hugging Face directory for a test to change."""
    return Path(shutil.copytree(run_folder / "exported", tmp_path / "model"))


def _change_weights(directory: Path, change: Callable[[Weights], Any]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def _change_config(directory: Path, **keys: Any) -> None:
    """Set keys; `...` takes one away."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | keys
    kept = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(kept))


def _imported(checkpoint: Path) -> Weights:
    """What a checkpoint holds, by the names of the training model."""
    shapes = saved_shapes(checkpoint)
    tensors = zip(shapes, read_whole_tensors(checkpoint, shapes), strict=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors}


def _assert_is_the_model_of(run_folder: Path, checkpoint: Path) -> None:
    found, expected = _imported(checkpoint), expected_parameters(run_folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_there_and_back_is_the_same_to_the_bit(run_folder: Path, tmp_path: Path) -> None:
    import_model(run_folder / "exported", tmp_path / "back", run_folder / "tiny.model")
    verified_manifest(tmp_path / "back")
    _assert_is_the_model_of(run_folder, tmp_path / "back")
    export_checkpoint(find_checkpoint(tmp_path / "back"), tmp_path / "again")
    for path in (run_folder / "exported").iterdir():
        expected, found = path.read_bytes(), (tmp_path / "again" / path.name).read_bytes()
        if path.name == "tokenizer_config.json":
            # How long the rows of training were is not known any more.
            expected = expected.replace(b'"model_max_length": 32', b'"model_max_length": 64')
        if path.name != "README.md":
            assert found == expected, path.name


def test_files_are_split_and_every_tensor_is_in_one(run_folder: Path, tmp_path: Path) -> None:
    import_model(run_folder / "exported", tmp_path / "back", max_file_bytes=20_000)
    assert len(verified_manifest(tmp_path / "back").files) > 4
    _assert_is_the_model_of(run_folder, tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_fp32_of_the_same_value(
    run_folder: Path, directory: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    _change_weights(directory, lambda w: w.update({n: t.to(dtype) for n, t in w.items()}))
    import_model(directory, tmp_path / "back")
    for name, tensor in _imported(tmp_path / "back").items():
        assert torch.equal(tensor, expected_parameters(run_folder)[name].to(dtype).float()), name


def test_several_files_with_an_index_are_one_model(
    run_folder: Path, directory: Path, tmp_path: Path
) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {}
    for number, names in enumerate((list(weights)[:9], list(weights)[9:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, directory / file)
        places |= dict.fromkeys(names, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    import_model(directory, tmp_path / "back")
    _assert_is_the_model_of(run_folder, tmp_path / "back")
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json: .*model-00002-of-00002.*missing"):
        import_model(directory, tmp_path / "torn")
    index.write_text(json.dumps({"weight_map": {"x": "../model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"weight_map.x is .*not a file's name"):
        import_model(directory, tmp_path / "torn")
    index.write_text(json.dumps({"weight_map": {"absent": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="places absent in model-00001"):
        import_model(directory, tmp_path / "torn")


def _untie(weights: Weights) -> None:
    word = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.weight"] = word.clone()
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]


def test_names_that_other_versions_save_too_are_taken(
    run_folder: Path, directory: Path, tmp_path: Path
) -> None:
    _change_weights(directory, _untie)
    import_model(directory, tmp_path / "both")
    _assert_is_the_model_of(run_folder, tmp_path / "both")
    _change_weights(directory, lambda weights: weights.pop("cls.predictions.bias"))
    import_model(directory, tmp_path / "one")
    _assert_is_the_model_of(run_folder, tmp_path / "one")


def test_a_decoder_of_its_own_is_refused(directory: Path, tmp_path: Path) -> None:
    def untie_and_change(weights: Weights) -> None:
        _untie(weights)
        weights["cls.predictions.decoder.weight"][3, 4] += 1

    _change_weights(directory, untie_and_change)
    with pytest.raises(CheckpointError, match=r"decoder\.weight differs from .*word_embeddings"):
        import_model(directory, tmp_path / "back")
    assert not any(path.name.startswith("back") for path in tmp_path.iterdir())


def test_all_missing_and_unknown_names_and_shapes_are_listed(
    directory: Path, tmp_path: Path
) -> None:
    def change(weights: Weights) -> None:
        for layer in (0, 1):
            del weights[f"bert.encoder.layer.{layer}.mlp.up_proj.bias"]
        del weights["bert.encoder.ln.weight"]
        weights["bert.pooler.dense.weight"] = torch.zeros(2, 2)
        weights["bert.encoder.ln.bias"] = torch.zeros(31)

    _change_weights(directory, change)
    with pytest.raises(CheckpointError) as error:
        import_model(directory, tmp_path / "back")
    for part in (
        "missing: bert.encoder.layer.{0-1}.mlp.up_proj.bias, bert.encoder.ln.weight",
        "unknown: bert.pooler.dense.weight",
        "bert.encoder.ln.bias is [31], but by config.json [32]",
    ):
        assert part in str(error.value)


def test_a_model_without_a_masked_word_head_is_told_to_lack_it(
    directory: Path, tmp_path: Path
) -> None:
    def drop_head(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith("cls.")]:
            del weights[name]

    _change_weights(directory, drop_head)
    with pytest.raises(
        CheckpointError, match=r"without the head that predicts .* a RetrievaBertForM"
    ):
        import_model(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_are_listed_whole_in_few_words() -> None:
    names = [*(f"a.{n}.b.weight" for n in (3, 0, 1, 2, 7)), "c", "d.5.e"]
    assert listed(names) == "a.{0-3,7}.b.weight, c, d.5.e"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "bert"}, r"config.json: model_type is 'bert', expected 'retrieva-bert'"),
        ({"mlp_bias": False}, "config.json: mlp_bias is False"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'"),
        ({"tie_word_embeddings": False}, "config.json: tie_word_embeddings is False"),
        ({"model_type": ["retrieva-bert"]}, r"config.json: model_type is \['retrieva-bert'\]"),
        ({"hidden_size": ...}, "config.json: hidden_size is missing"),
        ({"vocab_size": None}, "config.json: vocab_size is null"),
        ({"hidden_size": "32"}, "config.json: hidden_size is '32'"),
        ({"num_attention_heads": 5}, "hidden_size is 32, not a multiple of num_attention_heads"),
    ],
)
def test_another_architecture_is_refused_by_file_and_field(
    directory: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    _change_config(directory, **keys)
    with pytest.raises(CheckpointError, match=message):
        import_model(directory, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_pickled_weights_are_refused_with_a_way_out(directory: Path, tmp_path: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin .*pickled.*\(DIR\)\.save"):
        import_model(directory, tmp_path / "back")


def test_a_damaged_file_is_refused_and_nothing_is_left(directory: Path, tmp_path: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read as safetensors"):
        import_model(directory, tmp_path / "back")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor"):
        import_model(directory, tmp_path / "back")
    (directory / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: holds no JSON object"):
        import_model(directory, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_tokenizer_than_the_models_is_refused(
    directory: Path, tmp_path: Path, tiny_texts: list[str]
) -> None:
    other = tmp_path / "other.model"
    write_model(train_tokenizer(tiny_texts[:200], 512), other)
    with pytest.raises(DataError, match=r"other.model has .* at \d+, .*tokenizer.json has"):
        import_model(directory, tmp_path / "back", other)
    write_model(train_tokenizer(tiny_texts, 500), other)
    with pytest.raises(DataError, match=r"other.model has 500 pieces, .*tokenizer.json 512"):
        import_model(directory, tmp_path / "back", other)
    _change_config(directory, pad_token_id=7)
    with pytest.raises(DataError, match=r"pads with 4, but .*config.json has a pad_token_id of 7"):
        import_model(directory, tmp_path / "back")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: no such file; .*with tokenizer"):
        import_model(directory, tmp_path / "back")


def test_an_odd_vocabulary_is_kept_or_enlarged_without_a_change_of_what_is_computed(
    run_folder: Path, directory: Path, tmp_path: Path
) -> None:
    def widen(weights: Weights) -> None:
        for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
            weights[name] = torch.cat([weights[name], weights[name][:5]])

    _change_weights(directory, widen)
    _change_config(directory, vocab_size=VOCABULARY + 5)
    assert import_model(directory, tmp_path / "odd").vocab_size == VOCABULARY + 5
    odd = _imported(tmp_path / "odd")
    assert len(odd["head.bias"]) == VOCABULARY + 5
    import_model(directory, tmp_path / "even", vocab_size=640)
    even = _imported(tmp_path / "even")
    hidden = torch.randn(7, 32)
    logits = [hidden @ w["embeddings.word.weight"].T + w["head.bias"] for w in (odd, even)]
    probabilities = [one.softmax(-1) for one in logits]
    assert torch.allclose(probabilities[1][:, : VOCABULARY + 5], probabilities[0], atol=1e-6)
    assert not probabilities[1][:, VOCABULARY + 5 :].any()
    with pytest.raises(CheckpointError, match=r"vocab_size=512: .*vocab_size of 517"):
        import_model(directory, tmp_path / "less", vocab_size=512)


def _train_until(config: Config, last_step: int) -> list[dict[str, Any]]:
    return train(config, stop_after=last_step)


@pytest.mark.parametrize(("ranks", "parallel"), [(2, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})])
def test_pretraining_goes_on_from_an_import_in_any_layout(
    learned: Path, tiny_data: Path, tmp_path: Path, ranks: int, parallel: dict[str, int]
) -> None:
    config = _going_on(learned, tiny_data, tmp_path / "next", parallel=parallel)
    lines = steps_of(run_ranks(ranks, _train_until, config, 2)[0])
    expected = json.loads((learned / "expected.json").read_text())
    # Two steps, of fresh moments, after what the model has learned before.
    assert list(lines) == [1, 2]
    assert lines[1]["loss"] < expected["random"] - 0.1
    assert [line["loss"] for line in lines.values()] == pytest.approx(expected["next"], rel=1e-4)


def test_the_next_job_goes_on_from_its_own_checkpoint(
    learned: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = _going_on(learned, tiny_data, tmp_path / "next")
    run_ranks(1, _train_until, config, 2)
    lines = steps_of(run_ranks(1, _train_until, config, 3)[0])
    assert list(lines) == [1, 2, 3]
    manifest = Manifest.read(tmp_path / "next" / "checkpoints" / "step_00000003")
    assert manifest.state["optimizer_updates"] == 3


def test_an_import_is_not_for_another_model_or_tokenizer(learned: Path, tiny_data: Path) -> None:
    facts: Any = Manifest.read(learned / "imported").state
    kept = run_config(tiny_data, learned / "next", valid=False)
    check_resume(facts["config"], kept, 0, new_run=True, checkpoint="runs/a/step")
    changed = run_config(
        tiny_data,
        learned / "next",
        model={"norm_eps": 1e-5},
        data={"tokenizer": str(tiny_data / "train.txt")},
    )
    with pytest.raises(ConfigError) as error:
        check_resume(facts["config"], changed, 0, new_run=True, checkpoint="runs/a/step")
    assert "model.norm_eps: was 1e-12" in str(error.value)
    assert "data.tokenizer" in str(error.value)


def _going_on(learned: Path, data: Path, run_dir: Path, **changes: Any) -> Config:
    resume = {"resume": str(learned / "imported"), "interval": 100}
    return run_config(data, run_dir, valid=False, checkpoint=resume, **changes)


@pytest.fixture(scope="module")
def learned(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained, exported and imported; losses of a random one, and of its next."""
    folder = tmp_path_factory.mktemp("learned")
    config = run_config(tiny_data, folder / "run", valid=False)
    lines = steps_of(run_ranks(1, _train_until, config, 6)[0])
    export_checkpoint(find_checkpoint(folder / "run"), folder / "exported")
    import_model(folder / "exported", folder / "imported", tiny_data / "tiny.model")
    going_on = _going_on(folder, tiny_data, folder / "next")
    following = steps_of(run_ranks(1, _train_until, going_on, 2)[0])
    losses = {
        "random": lines[1]["loss"],
        "next": [line["loss"] for line in following.values()],
    }
    (folder / "expected.json").write_text(json.dumps(losses))
    return folder
