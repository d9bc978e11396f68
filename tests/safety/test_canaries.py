"""Files from strangers never execute code: each case has a canary, which makes a folder if it does.

What such a file is named as is refused as a user's error, or it is not looked at.
"""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zstandard

from megatron_bert.checkpoint.manifest import FileRecord, Manifest, file_checksum
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from megatron_bert.errors import UserError
from tests.distributed_harness import run_ranks
from tests.safety.canaries import BINARY, nested, pickled, saved_by_numpy, saved_by_torch, yaml_tag
from tests.safety.support import error_of
from tests.training.runs import run_config, steps_of, train

Make = Callable[[Path], bytes]

every_kind = pytest.mark.parametrize("make", BINARY)
every_kind_of_json = pytest.mark.parametrize("make", [*BINARY, nested])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What is there only if a canary was executed."""
    return tmp_path / "executed"


@pytest.fixture
def config_file(tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(run_config(tiny_data, tmp_path / "run")))
    return path


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny corpus, to be spoiled."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.mark.parametrize(
    "read",
    [
        lambda trace: pickle.loads(pickled(trace)),
        lambda trace: torch.load(io.BytesIO(saved_by_torch(trace)), weights_only=False),
        lambda trace: np.load(io.BytesIO(saved_by_numpy(trace)), allow_pickle=True),
        lambda trace: yaml.unsafe_load(yaml_tag(trace)),
    ],
    ids=["pickle", "torch", "numpy", "yaml"],
)
def test_the_canaries_sing_where_files_are_read_without_care(
    trace: Path, read: Callable[[Path], object]
) -> None:
    read(trace)
    assert trace.is_dir()


def test_tags_in_a_configuration_are_refused(config_file: Path, trace: Path) -> None:
    text = config_file.read_text()
    config_file.write_text(text.replace("seed: 11", f"seed: {yaml_tag(trace)}"))
    for command in (
        ("pretrain_bert", "--dry-run"),
        ("pretrain_bert", "--print-config"),
        ("tools.inspect_data", "--steps", "1:2"),
    ):
        module, *rest = command
        assert "python/object" in error_of(module, "--config", config_file, *rest)
    assert not trace.exists()


@pytest.mark.parametrize("key", ["run.seed", "run.dir", "curriculum", "data.train.0.prefix"])
def test_tags_in_an_override_are_refused(config_file: Path, trace: Path, key: str) -> None:
    override = f"{key}={yaml_tag(trace)}"
    for command in (("pretrain_bert", "--dry-run"), ("tools.inspect_data", "--steps", "1:2")):
        module, *rest = command
        assert override in error_of(module, "--config", config_file, *rest, override)
    assert not trace.exists()


def _train(config: Config, stop_after: int) -> list[int]:
    return list(steps_of(train(config, stop_after=stop_after)))


def test_what_lies_in_the_directory_of_a_run_that_goes_on_is_not_executed(
    tiny_data: Path, tmp_path: Path, trace: Path
) -> None:
    config = run_config(tiny_data, tmp_path / "run")
    run_ranks(1, _train, config, 4)
    run = config.run.directory
    (run / "config.yaml").write_text(f"run: {yaml_tag(trace)}\n")
    saved = run / "checkpoints" / "step_00000004"
    for name in (".metadata", "__0_0.distcp", "optimizer.pt", "pytorch_model.bin", "extra.npy"):
        (saved / name).write_bytes(pickled(trace))
    for name in ("STOPPED", "run.lock", "checkpoints/latest"):
        (run / name).write_bytes(pickled(trace))
    (run / "sitecustomize.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    assert run_ranks(1, _train, config, 99) == [list(range(1, 13))]
    assert (run / "config.yaml").read_text() == dump_config(config)
    assert not trace.exists()


@every_kind_of_json
@pytest.mark.parametrize("name", ["other.model", "other.json"])
def test_a_tokenizer_that_is_none_is_refused(
    config_file: Path, tmp_path: Path, trace: Path, make: Make, name: str
) -> None:
    tokenizer = tmp_path / name
    tokenizer.write_bytes(make(trace))
    (tmp_path / "a.txt").write_text("text\n")
    preprocess = ("--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "set")
    for error in (
        error_of(
            "pretrain_bert", "--config", config_file, "--dry-run", f"data.tokenizer={tokenizer}"
        ),
        error_of("tools.preprocess_data", "--tokenizer", tokenizer, *preprocess),
    ):
        assert f"tokenizer {tokenizer} is not a" in error
    assert not trace.exists()


def test_a_tokenizer_json_with_tags_of_yaml_is_refused(
    config_file: Path, tmp_path: Path, trace: Path
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(f"model: {yaml_tag(trace)}\n")
    arguments = ("--config", config_file, "--dry-run", f"data.tokenizer={tokenizer}")
    assert "is not a tokenizer.json" in error_of("pretrain_bert", *arguments)
    assert not trace.exists()


@every_kind_of_json
@pytest.mark.parametrize("suffix", [".idx", ".bin", ".json", ".words"])
def test_a_dataset_of_which_a_file_is_another_is_refused(
    own_data: Path, tmp_path: Path, trace: Path, make: Make, suffix: str
) -> None:
    (own_data / f"train{suffix}").write_bytes(make(trace))
    config = tmp_path / "tiny.yaml"
    changes = {"mlm": {"unit": "whole_word"}}
    config.write_text(dump_config(run_config(own_data, tmp_path / "run", **changes)))
    prefix = own_data / "train"
    for error in (
        error_of("pretrain_bert", "--config", config, "--dry-run"),
        error_of("tools.inspect_data", "--config", config, "--steps", "1:2"),
        error_of("tools.merge_datasets", "--input", prefix, "--output-prefix", tmp_path / "all"),
    ):
        assert str(prefix) in error
    assert not trace.exists()


@every_kind_of_json
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "b.gz", "a.parquet"])
def test_text_that_is_none_is_refused(
    tiny_data: Path, tmp_path: Path, trace: Path, make: Make, name: str
) -> None:
    content = make(trace)
    if name.startswith("a.jsonl."):
        compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
        content = compress[Path(name).suffix](content)
    source = tmp_path / name
    source.write_bytes(content)
    for arguments in (
        (
            "tools.preprocess_data",
            "--tokenizer",
            tiny_data / "tiny.model",
            "--output-prefix",
            tmp_path / "p",
        ),
        ("tools.train_tokenizer", "--vocab-size", 300, "--output", tmp_path / "t.model"),
        ("tools.split_corpus", "--train", tmp_path / "t.jsonl", "--valid", tmp_path / "v.jsonl"),
    ):
        module, *rest = arguments
        assert str(source) in error_of(module, "--input", source, *rest)
    assert not trace.exists()


@every_kind_of_json
def test_the_journal_of_a_job_that_was_none_is_refused(
    tiny_data: Path, tmp_path: Path, trace: Path, make: Make
) -> None:
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "journal.json").write_bytes(make(trace))
    (tmp_path / "a.txt").write_text("text\n")
    arguments = ("--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "set")
    model = ("--tokenizer", tiny_data / "tiny.model")
    assert "journal.json" in error_of("tools.preprocess_data", *arguments, *model)
    assert not trace.exists()


def _errors_of_converting(folder: Path, output: Path) -> list[str]:
    to_hf = ("to-hf", "--checkpoint", folder, "--output", output)
    return [
        error_of("tools.convert_checkpoint", *to_hf),
        error_of("tools.convert_checkpoint", "inspect", folder),
    ]


def _errors_of_all_readers(config_file: Path, folder: Path, output: Path) -> list[str]:
    branch = ("--config", config_file, "--dry-run", f"checkpoint.resume={folder}")
    return [error_of("pretrain_bert", *branch), *_errors_of_converting(folder, output)]


@every_kind
def test_a_folder_of_pickles_is_no_checkpoint(
    config_file: Path, tmp_path: Path, trace: Path, make: Make
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in (".metadata", "__0_0.distcp", "model.pt", "pytorch_model.bin", "weights.npy"):
        (folder / name).write_bytes(make(trace))
    for error in _errors_of_all_readers(config_file, folder, tmp_path / "out"):
        assert str(folder) in error
        assert "manifest.json" in error
    assert not trace.exists()


@every_kind_of_json
def test_a_manifest_that_is_none_is_refused(
    config_file: Path, tmp_path: Path, trace: Path, make: Make
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(make(trace))
    for error in _errors_of_all_readers(config_file, folder, tmp_path / "out"):
        assert f"{folder / 'manifest.json'}: not a manifest" in error
    assert not trace.exists()


@every_kind
def test_a_shard_that_is_none_is_refused_though_a_forged_manifest_vouches_for_it(
    tiny_data: Path, tmp_path: Path, trace: Path, make: Make
) -> None:
    config = run_config(tiny_data, tmp_path / "first")
    run_ranks(1, _train, config, 2)
    folder = tmp_path / "first" / "checkpoints" / "step_00000002"
    manifest = Manifest.read(folder)
    for name in manifest.files:
        (folder / name).write_bytes(make(trace))
    files = {
        name: FileRecord((folder / name).stat().st_size, file_checksum(folder / name))
        for name in manifest.files
    }
    Manifest(2, files, manifest.state).write(folder)
    branch = run_config(tiny_data, tmp_path / "branch", checkpoint={"resume": str(folder)})
    errors = run_ranks(1, _refused, branch) + _errors_of_converting(folder, tmp_path / "out")
    for error in errors:
        assert f"cannot read the shards in {folder}" in error
    assert not trace.exists()


def _refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


@pytest.mark.parametrize("state", [{}, {"config": None}, {"config": {"model": 5}, "step": "x"}])
def test_a_manifest_without_a_runs_state_is_refused(
    config_file: Path, tmp_path: Path, state: dict[str, object]
) -> None:
    folder = CheckpointStore(tmp_path / "other", keep=1).save(2, {}, state)  # type: ignore[arg-type]
    for error in _errors_of_all_readers(config_file, folder, tmp_path / "out"):
        assert str(folder) in error
