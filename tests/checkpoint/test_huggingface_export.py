from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megatron_bert.checkpoint import huggingface_export, shard_files
from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.huggingface_import import import_model
from megatron_bert.checkpoint.huggingface_names import model_parameters
from megatron_bert.checkpoint.manifest import Manifest
from megatron_bert.checkpoint.shard_files import Piece, write_file
from megatron_bert.checkpoint.store import CheckpointStore, find_checkpoint
from megatron_bert.errors import CheckpointError, DataError
from tests.checkpoint.huggingface_run import VOCABULARY, expected_parameters, make_run
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks
from tests.small_model import small_config


@pytest.fixture(scope="module")
def run_folder(tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a run that has one checkpoint, and the logits of its model."""
    folder = tmp_path_factory.mktemp("export")
    make_run(folder, tiny_tokenizer_path)
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
assert tokenizer.model_max_length == 32, tokenizer.model_max_length
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
        timeout=DEADLINE_SECONDS,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    saved = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(tensor, saved[name]), name


def test_every_parameter_is_exported_once_under_its_name(run_folder: Path, exported: Path) -> None:
    ours = expected_parameters(run_folder)
    theirs = load_file(exported / "model.safetensors")
    table = model_parameters(small_config().model, VOCABULARY)
    assert sorted(p.name for p in table) == sorted(ours)
    assert sorted(p.theirs for p in table) == sorted(theirs)
    for parameter in table:
        assert torch.equal(theirs[parameter.theirs], ours[parameter.name]), parameter
    # No two hold the same, or an exchange of them would go unnoticed.
    values = [tensor.flatten().tolist() for tensor in ours.values()]
    assert not any(a == b for n, a in enumerate(values) for b in values[:n])


def _save_sharded(folder: Path) -> None:
    """Save the run's weights again, in blocks over six ranks, some of them uneven."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    tensors = {}
    for name, whole in expected_parameters(folder).items():
        places = (Shard(0), Shard(1)) if whole.dim() == 2 else (Shard(0), Replicate())
        tensors[f"model.{name}"] = distribute_tensor(whole, mesh, places)
    manifest = Manifest.read(find_checkpoint(folder / "run"))
    CheckpointStore(folder / "sharded", keep=1).save(10, tensors, manifest.state)


def test_a_checkpoint_of_many_ranks_gives_the_same_file(
    run_folder: Path, exported: Path, tmp_path: Path
) -> None:
    run_ranks(6, _save_sharded, run_folder)
    checkpoint = run_folder / "sharded" / "step_00000010"
    assert len(list(checkpoint.glob("*.safetensors"))) == 6
    export_checkpoint(checkpoint, tmp_path / "new")
    weights = (tmp_path / "new" / "model.safetensors").read_bytes()
    assert weights == (exported / "model.safetensors").read_bytes()


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


@pytest.mark.parametrize("way", ["to-hf", "from-hf"])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    run_folder: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def write_half(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (huggingface_export, shard_files):
        monkeypatch.setattr(module, "write_file", write_half)
    output = tmp_path / "parent" / "new"
    ways: dict[str, Callable[[], object]] = {
        "to-hf": partial(export_checkpoint, find_checkpoint(run_folder / "run"), output),
        "from-hf": partial(import_model, exported, output),
    }
    with pytest.raises(CheckpointError, match=r"cannot write .*new: .*No space left.*free space"):
        ways[way]()
    assert not any(tmp_path.iterdir())


def test_a_place_that_the_host_refuses_to_look_at_is_named(run_folder: Path) -> None:
    place = Path("x" * 300)
    with pytest.raises(CheckpointError, match=r"cannot write x+: .*; name another place"):
        export_checkpoint(find_checkpoint(run_folder / "run"), place)


def _checkpoint_of(folder: Path, state: dict[str, Any], *pieces: Piece) -> Path:
    """A checkpoint whose every file is intact, with other tensors."""
    folder.mkdir()
    files = {}
    for number, piece in enumerate(pieces):
        name = f"shard-{number}.safetensors"
        files[name] = write_file(folder / name, [piece], lambda: None)
    Manifest(3, files, state).write(folder)
    return folder


def _piece(name: str, rows: int, first: int = 0, width: int = 32) -> Piece:
    tensor = torch.zeros(rows, width)
    return Piece(name, tensor.dtype, (rows, width), (first, 0), lambda: (tensor,))


def test_all_tensors_that_do_not_fit_the_manifest_are_named(
    run_folder: Path, tmp_path: Path
) -> None:
    state: Any = Manifest.read(find_checkpoint(run_folder / "run")).state
    word = "model.embeddings.word.weight"
    torn = _checkpoint_of(tmp_path / "torn", state, _piece(word, 4), _piece(word, 4, first=6))
    with pytest.raises(CheckpointError, match=f"incomplete in the checkpoint: {word}"):
        export_checkpoint(torn, tmp_path / "new")
    none = _checkpoint_of(tmp_path / "none", state, _piece("optim.x", 4))
    with pytest.raises(CheckpointError, match="holds no model"):
        export_checkpoint(none, tmp_path / "new")
    pieces = (_piece(word, 512, width=31), _piece("model.pooler", 2))
    other = _checkpoint_of(tmp_path / "other", state, *pieces)
    with pytest.raises(CheckpointError) as error:
        export_checkpoint(other, tmp_path / "new")
    assert "blocks.{0-1}.feed_forward.up.bias" in str(error.value)
    assert "unknown: pooler" in str(error.value)
    assert "of another shape than its manifest says: embeddings.word.weight" in str(error.value)
    assert not (tmp_path / "new").exists()


def test_another_tokenizer_than_the_runs_is_refused_with_both_hashes(
    run_folder: Path, tmp_path: Path, tiny_texts: list[str]
) -> None:
    from megatron_bert.data.tokenizer_training import train_tokenizer, write_model

    other = tmp_path / "other.model"
    write_model(train_tokenizer(tiny_texts, 500), other)
    with pytest.raises(
        DataError, match=r"has the hash .* trained with one of .*; name that one with tokenizer"
    ):
        export_checkpoint(find_checkpoint(run_folder / "run"), tmp_path / "out", tokenizer=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_what_is_no_checkpoint_is_refused_with_a_remedy(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="name a complete checkpoint"):
        find_checkpoint(tmp_path / place)
