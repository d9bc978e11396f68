"""Models of ModernBERT's topology are transformers' own, without code of this project."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    pipeline,
)
from transformers import ModernBertForMaskedLM as TheirModel

from megatron_bert.checkpoint.huggingface_config import read_config
from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.huggingface_import import import_model
from megatron_bert.checkpoint.manifest import verified_manifest
from megatron_bert.checkpoint.store import find_checkpoint
from megatron_bert.checkpoint.tensors import read_whole_tensors, saved_shapes
from megatron_bert.errors import CheckpointError
from tests.checkpoint.huggingface_run import VOCABULARY, expected_parameters, make_run
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks
from tests.huggingface.releases import older_release, packages_folder
from tests.training.runs import run_config, steps_of, train
from tools import convert_checkpoint as tool

MODEL = {
    "architecture": "modernbert",
    "num_layers": 5,
    "num_query_groups": 4,
    # Less than the segments' lengths, so that windows end within them.
    "local_attention": 6,
    # None of them a default of transformers, which a key that it overlooks would leave in place.
    "global_attention_every": 2,
    "rope_theta": 500.0,
    "local_rope_theta": 20.0,
    "norm_eps": 1e-4,
}
OLDER_KEYS = {"global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"}
NEWER_KEYS = {"layer_types", "rope_parameters"}


@pytest.fixture(scope="module")
def run_folder(tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modernbert")
    export_checkpoint(make_run(folder, tiny_tokenizer_path, **MODEL), folder / "exported")
    return folder


@pytest.fixture(scope="module")
def model(run_folder: Path) -> TheirModel:
    model = AutoModelForMaskedLM.from_pretrained(run_folder / "exported")
    assert type(model) is TheirModel
    return model.eval()


def _segments(run_folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and expected logits of every segment of the packed rows."""
    expected = torch.load(run_folder / "expected.pt")
    found = []
    for tokens, positions, logits in zip(
        expected["inputs"]["tokens"],
        expected["inputs"]["positions"],
        expected["logits"],
        strict=True,
    ):
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(tokens)]
        for begin, end in itertools.pairwise(begins):
            found.append((tokens[begin:end].long(), logits[begin:end]))
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_own_model_gives_the_training_models_logits(
    run_folder: Path, model: TheirModel, attention: str
) -> None:
    model.set_attn_implementation(attention)
    segments = _segments(run_folder)
    assert max(len(tokens) for tokens, _ in segments) > 2 * MODEL["local_attention"]
    with torch.no_grad():
        for tokens, logits in segments:
            torch.testing.assert_close(model(tokens[None]).logits[0], logits, rtol=1e-4, atol=1e-4)


_LOGITS = """
import sys, torch, transformers
exported, segments, found = sys.argv[1:]
model = transformers.AutoModelForMaskedLM.from_pretrained(exported).eval()
with torch.no_grad():
    logits = [model(tokens[None]).logits[0] for tokens in torch.load(segments)]
torch.save((transformers.__version__, type(model).__module__, logits), found)
"""


@pytest.mark.peers
def test_the_older_transformers_gives_them_too(run_folder: Path, tmp_path: Path) -> None:
    segments = _segments(run_folder)
    torch.save([tokens for tokens, _ in segments], tmp_path / "segments")
    subprocess.run(
        [sys.executable, "-c", _LOGITS, run_folder / "exported", *("segments", "found")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(packages_folder(older_release()) or "")},
        check=True,
        timeout=DEADLINE_SECONDS,
    )
    release, module, found = torch.load(tmp_path / "found")
    assert (release, module) == (older_release(), TheirModel.__module__)
    for logits, (_, expected) in zip(found, segments, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_padded_batch_has_the_same_logits(run_folder: Path, model: TheirModel) -> None:
    segments = _segments(run_folder)
    tokens = torch.nn.utils.rnn.pad_sequence([t for t, _ in segments], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(t) for t, _ in segments], batch_first=True
    )
    with torch.no_grad():
        found = model(tokens, attention_mask=mask).logits
    for row, (_, logits) in zip(found, segments, strict=True):
        torch.testing.assert_close(row[: len(logits)], logits, rtol=1e-4, atol=1e-4)


def test_an_export_holds_no_code_and_fills_masks(run_folder: Path) -> None:
    exported = run_folder / "exported"
    assert {path.suffix for path in exported.iterdir()} == {".json", ".md", ".safetensors"}
    config = json.loads((exported / "config.json").read_text())
    # A classifier put upon it reads all tokens: nothing has taught CLS to stand for them.
    assert config["classifier_pooling"] == "mean"
    assert "auto_map" not in config
    assert "trust_remote_code" not in (exported / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    # No row was longer than 32; rotary positions beyond are no random numbers.
    assert tokenizer.model_max_length == 64
    fill = pipeline("fill-mask", str(exported), tokenizer=tokenizer)
    assert len(fill(f"吾輩は{tokenizer.mask_token}である")) == 5


def _imported(checkpoint: Path) -> dict[str, torch.Tensor]:
    shapes = saved_shapes(checkpoint)
    tensors = zip(shapes, read_whole_tensors(checkpoint, shapes), strict=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors}


def test_every_parameter_is_mapped_once_there_and_back_to_the_bit(
    run_folder: Path, tmp_path: Path
) -> None:
    exported = run_folder / "exported"
    model = import_model(exported, tmp_path / "back", run_folder / "tiny.model")
    assert {name: getattr(model, name) for name in MODEL} == MODEL
    verified_manifest(tmp_path / "back")
    found, expected = _imported(tmp_path / "back"), expected_parameters(run_folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # No two hold the same, or an exchange of them would go unnoticed.
    values = [tensor.flatten().tolist() for tensor in expected.values()]
    assert not any(a == b for n, a in enumerate(values) for b in values[:n])
    export_checkpoint(find_checkpoint(tmp_path / "back"), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(again[name], tensor), name


def test_a_classifier_is_told_from_a_damaged_directory(run_folder: Path, tmp_path: Path) -> None:
    exported, saved = run_folder / "exported", tmp_path / "saved"
    AutoModelForSequenceClassification.from_pretrained(exported).save_pretrained(saved)
    with pytest.raises(CheckpointError) as error:
        import_model(saved, tmp_path / "start", run_folder / "tiny.model")
    told = str(error.value)
    assert "a ModernBertForSequenceClassification without the head" in told
    assert "missing: decoder.bias" in told
    assert "name a directory of a ModernBertForMaskedLM" in told


def test_what_transformers_saved_goes_on_in_pretraining(
    tiny_data: Path, run_folder: Path, tmp_path: Path
) -> None:
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        local_attention=6,
        pad_token_id=4,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=5,
        sep_token_id=6,
    )
    saved = tmp_path / "saved"
    theirs = TheirModel(config)
    torch.nn.init.normal_(theirs.decoder.bias)
    theirs.save_pretrained(saved)
    tokenizer = tiny_data / "tiny.model"
    shape = import_model(saved, tmp_path / "start", tokenizer)
    assert (shape.rope_theta, shape.local_rope_theta) == (160_000.0, 10_000.0)
    assert (shape.global_attention_every, shape.local_attention) == (3, 6)
    export_checkpoint(find_checkpoint(tmp_path / "start"), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    own = load_file(saved / "model.safetensors")
    assert again.keys() == own.keys() - {"decoder.weight"}
    assert all(torch.equal(again[name], own[name]) for name in again)
    keys = shape.model_dump(mode="json", exclude={"preset"})
    run = run_config(
        tiny_data,
        tmp_path / "run",
        model=keys,
        parallel={"tensor": 2, "sequence": True},
        checkpoint={"resume": str(tmp_path / "start")},
    )
    lines = run_ranks(2, train, run)[0]
    assert list(steps_of(lines)) == list(range(1, 13))


def _refusal(run_folder: Path, tmp_path: Path, **keys: Any) -> str:
    directory = tmp_path / "model"
    directory.mkdir()
    for path in (run_folder / "exported").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(CheckpointError) as refused:
        import_model(directory, tmp_path / "refused", run_folder / "tiny.model")
    assert not (tmp_path / "refused").exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm_bias": True}, "norm_bias is True, but the training model has False only"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"classifier_bias": True}, "classifier_bias is True"),
        ({"decoder_bias": False}, "decoder_bias is False"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"classifier_activation": "relu"}, "classifier_activation is 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling is {'rope_type': 'linear'}"),
        ({"local_attention": 7}, "local_attention is 7"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types is"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        (
            {"layer_types": ["full_attention"] * 3},
            "layer_types has 3 entries, but num_hidden_layers 5",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is {'rope_type': 'yarn'}"),
        ({"rope_parameters": []}, "rope_parameters is []"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters.full_attention.rope_type is 'yarn'",
        ),
    ],
)
def test_a_modernbert_that_cannot_be_trained_here_is_refused_by_the_field(
    run_folder: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    refusal = _refusal(run_folder, tmp_path, **keys)
    assert "config.json" in refusal
    assert message in refusal


@pytest.mark.parametrize("dropped", [OLDER_KEYS, NEWER_KEYS], ids=["older", "newer"])
def test_either_releases_keys_say_all(run_folder: Path, tmp_path: Path, dropped: set[str]) -> None:
    content = json.loads((run_folder / "exported" / "config.json").read_text())
    assert content.keys() >= dropped
    kept = {key: value for key, value in content.items() if key not in dropped}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    model = read_config(tmp_path).model
    assert {name: getattr(model, name) for name in MODEL} == MODEL
    theirs = ModernBertConfig.from_pretrained(tmp_path)
    assert {key: getattr(theirs, key) for key in NEWER_KEYS} == {k: content[k] for k in NEWER_KEYS}


def test_what_a_configuration_leaves_out_is_as_in_transformers(
    run_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((run_folder / "exported" / "config.json").read_text())
    optional = ("norm_eps", "embedding_dropout", "mlp_dropout", "attention_dropout")
    rest = {key: value for key, value in content.items() if key not in optional}
    (tmp_path / "config.json").write_text(json.dumps(rest))
    model, theirs = read_config(tmp_path).model, ModernBertConfig()
    assert model.norm_eps == theirs.norm_eps
    assert model.hidden_dropout == theirs.embedding_dropout == theirs.mlp_dropout
    assert model.attention_dropout == theirs.attention_dropout


def test_local_layers_without_a_base_of_their_own_have_the_others(
    run_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((run_folder / "exported" / "config.json").read_text())
    older = {key: value for key, value in content.items() if key not in NEWER_KEYS}
    for keys, theta in (({}, 500.0), ({"global_rope_theta": ...}, 160_000.0)):
        changed = older | {"local_rope_theta": None} | keys
        kept = {key: value for key, value in changed.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        model = read_config(tmp_path).model
        assert model.local_rope_theta == model.rope_theta == theta


def test_special_tokens_are_the_tokenizers(run_folder: Path, model: TheirModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "exported")
    for role in ("pad", "cls", "sep", "bos", "eos"):
        number = getattr(model.config, f"{role}_token_id")
        assert number == getattr(tokenizer, f"{role}_token_id")
        assert number is not None


def test_the_tool_takes_and_shows_both_directions(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, exported, back = run_folder / "run", tmp_path / "exported", tmp_path / "back"
    tool.main(["to-hf", "--checkpoint", str(run), "--output", str(exported), "--dtype", "bf16"])
    tool.main(["from-hf", "--model", str(exported), "--output", str(back)])
    printed = capsys.readouterr().out
    assert "architecture: modernbert" in printed
    assert "local_attention: " in printed
    tool.main(["inspect", str(exported)])
    tool.main(["inspect", str(back)])
    shown = capsys.readouterr().out
    assert shown.count("modernbert, 5 layers") == 2
    assert "BF16 in 1 files" in shown
    assert "from-hf takes it" in shown
