"""Nothing is written where a name in a path leads out of the folder that it was meant for."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from megatron_bert.checkpoint.manifest import FileRecord, Manifest
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.command_line.places import place_problem
from megatron_bert.config.load import dump_config, load_config
from megatron_bert.errors import CheckpointError, ConfigError
from tests.safety.support import error_of
from tests.tools.merge_support import write_set
from tests.training.runs import run_config

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "retrievabert_1.3b.yaml"
PLAN = ("--config", str(RECIPE), "--gpus", "8", "--gpu", "h100-80gb")


@pytest.mark.parametrize(
    "path", ["runs/a", "/data/a", "../a", "../../a", "..a/b..", "a/...", "..", "."]
)
def test_names_and_neighbours_may_be_written_to(path: str) -> None:
    assert place_problem(Path(path)) is None


@pytest.mark.parametrize(
    ("path", "meant"),
    [("runs/..", "."), ("runs/../../a", "../a"), ("/data/../etc/a", "/etc/a"), ("../a/..", "..")],
)
def test_a_name_that_is_taken_back_is_refused_with_what_it_would_be(path: str, meant: str) -> None:
    problem = place_problem(Path(path))
    assert problem is not None
    assert f"give {meant} if" in problem


@pytest.fixture
def config_file(tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(run_config(tiny_data, tmp_path / "run")))
    return path


def test_a_run_name_cannot_climb_out_of_the_runs(config_file: Path, tmp_path: Path) -> None:
    error = error_of(
        "pretrain_bert", "--config", config_file, "--dry-run", "run.dir=runs/../../elsewhere"
    )
    assert "run.dir = runs/../../elsewhere" in error
    assert "give ../elsewhere if" in error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_configuration_files_name_makes_no_run_outside_the_runs(
    config_file: Path, tmp_path: Path
) -> None:
    for name in ("...yaml", "..yaml", "....yaml"):
        odd = tmp_path / name
        odd.write_text(config_file.read_text())
        # What the stem of such a name is differs between versions of Python.
        with contextlib.suppress(ConfigError):
            folder = load_config(odd, ["run.dir=null"]).run.directory
            assert Path(os.path.normpath(folder)).parts[0] == "runs"


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("preprocess_data", ["--input", "T", "--tokenizer", "M", "--output-prefix", "OUT"]),
        ("merge_datasets", ["--input", "SET", "--output-prefix", "OUT"]),
        ("train_tokenizer", ["--input", "T", "--vocab-size", "300", "--output", "OUT.model"]),
        ("split_corpus", ["--input", "T", "--train", "OUT.jsonl", "--valid", "v.jsonl"]),
        ("split_corpus", ["--input", "T", "--train", "t.jsonl", "--valid", "OUT.jsonl"]),
        ("convert_checkpoint", ["to-hf", "--checkpoint", "CHECKPOINT", "--output", "OUT"]),
        ("finetune_jglue", ["--model", "M", "--task", "jsts", "--data", "T", "--output", "OUT"]),
        ("report", ["RUN", "--output", "OUT.html"]),
        ("report", ["RUN", "--picture", "OUT.svg"]),
        ("plan", [*PLAN, "--output", "OUT.yaml"]),
        ("plan", [*PLAN, "--picture", "OUT.svg"]),
    ],
)
def test_no_tool_writes_where_a_name_climbs_out(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    arguments: list[str],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("T.txt").write_text("one\ntwo\n")
    write_set(Path("set"), [[1, 2]])
    Path("run").mkdir()
    line = {"step": 1, "stage": 0, "seq_length": 8, "loss": 1.0, "lr": 1.0, "tokens": 8}
    Path("run/metrics.jsonl").write_text(json.dumps(line | {"step_seconds": 1.0}) + "\n")
    CheckpointStore(Path("run/checkpoints"), keep=1).save(1, {}, {})
    before = sorted(path for path in tmp_path.rglob("*"))
    given = {
        "T": "T.txt",
        "M": str(tiny_data / "tiny.model"),
        "SET": "set",
        "RUN": "run",
        "CHECKPOINT": "run",
    }
    named = [given.get(part, part.replace("OUT", "name/../../out")) for part in arguments]
    error = error_of(f"tools.{tool}", *named)
    assert "name/../../out" in error
    assert "give ../out" in error
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname"])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    folder = store.save(1, {}, {})
    (tmp_path / "checkpoints" / "outside.safetensors").write_bytes(b"")
    Manifest(1, {name: FileRecord(0, "2d06800538d394c2")}, {}).write(folder)
    with pytest.raises(CheckpointError, match="missing"):
        store.load(folder, {})
