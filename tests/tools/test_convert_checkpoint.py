"""The tool: what it prints, its exit codes, and that nothing half stands."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bert.checkpoint import manifest as manifest_module
from megatron_bert.checkpoint.manifest import Manifest, file_checksum, verified_manifest
from megatron_bert.command_line.run import run_cli
from tests.checkpoint.huggingface_run import make_run
from tests.deadlines import DEADLINE_SECONDS
from tools import convert_checkpoint as tool

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def _tool(*arguments: object) -> Result:
    """The tool in this process, which has imported torch already."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        run_cli(lambda: tool.main([str(argument) for argument in arguments]))
    assert isinstance(end.value.code, int)
    return Result(end.value.code, stdout.getvalue(), stderr.getvalue())


def _succeeds(*arguments: object) -> str:
    result = _tool(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def made(tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its export and that one's import, each made by the tool."""
    folder = tmp_path_factory.mktemp("tool")
    make_run(folder, tiny_tokenizer_path)
    shown = _succeeds(
        *("to-hf", "--checkpoint", folder / "run", "--output", folder / "exported"),
        *("--dtype", "bf16", "--license", "apache-2.0", "--language", "ja,en"),
    )
    assert shown.startswith(f"wrote {folder / 'exported'}, the model of ")
    shown = _succeeds(
        *("from-hf", "--model", folder / "exported", "--output", folder / "imported"),
        *("--tokenizer", folder / "tiny.model"),
    )
    assert "--tokenizer" not in shown
    (folder / "keys.yaml").write_text(shown.partition("\n")[2])
    return folder


def test_it_runs_from_anywhere_with_a_users_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, TOOL, "to-hf", "--checkpoint", "none", "--output", "new"]
    refused = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=DEADLINE_SECONDS
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: none: no such directory; name a complete checkpoint")
    assert not any(tmp_path.iterdir())


def test_from_hf_prints_the_keys_of_a_run_that_goes_on(made: Path) -> None:
    keys = yaml.safe_load((made / "keys.yaml").read_text())
    assert keys["checkpoint"]["resume"] == str(made / "imported")
    assert keys["data"]["tokenizer"] == str(made / "tiny.model")
    assert keys["model"]["vocab_size"] == 512
    assert keys["model"]["norm_eps"] == 1e-12
    assert not [key for key in keys["model"] if "rope" in key or "local" in key or "global" in key]
    card = (made / "exported" / "README.md").read_text("utf-8")
    assert 'license: apache-2.0\nlanguage: ["ja", "en"]\n' in card


@pytest.mark.parametrize("text", ["Japanese", "ja,", "ja, en", ""])
def test_a_language_that_is_no_code_is_refused(text: str, tmp_path: Path) -> None:
    refused = _tool("to-hf", "--checkpoint", "x", "--output", tmp_path / "new", "--language", text)
    assert refused.returncode == 2
    assert ": no code of a language; give those of ISO 639" in refused.stderr


def test_inspect_shows_a_runs_checkpoint(made: Path) -> None:
    shown = _succeeds("inspect", made / "run")
    assert "step        10, 80 rows consumed" in shown
    assert "saved by    pipeline 2, data 4, tensor 1 (2 copies), schedule interleaved" in shown
    assert "; 35,136 parameters" in shown
    assert "intact      every size and checksum is the manifest's" in shown
    (checkpoint,) = (made / "run" / "checkpoints").glob("step_*")
    assert "intact      not verified" in _succeeds("inspect", checkpoint, "--no-verify")


@pytest.mark.parametrize("named", ["run", "run/checkpoints/step_00000010"])
@pytest.mark.parametrize(
    ("command", "times"),
    [(("to-hf", "--checkpoint"), 1), (("inspect",), 1), (("inspect", "--no-verify"), 0)],
    ids=["to-hf", "inspect", "no-verify"],
)
def test_a_checkpoints_files_are_verified_once_and_not_at_all_where_that_is_asked(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: str,
    command: tuple[str, ...],
    times: int,
) -> None:
    read: list[Path] = []

    def count(path: Path) -> str:
        read.append(path)
        return file_checksum(path)

    monkeypatch.setattr(manifest_module, "file_checksum", count)
    output = ("--output", tmp_path / "new") if command[0] == "to-hf" else ()
    _succeeds(*command, made / named, *output)
    files = (made / "run" / "checkpoints" / "step_00000010").glob("*.safetensors")
    assert sorted(read) == sorted([*files] * times)


def test_an_output_that_exists_is_refused_before_the_checkpoint_is_read(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "file_checksum", pytest.fail)
    refused = _tool("to-hf", "--checkpoint", made / "run", "--output", made / "exported")
    assert refused.returncode == 2
    assert "exported exists already" in refused.stderr


def test_inspect_shows_an_import_and_an_export(made: Path) -> None:
    assert "weights without an optimizer's moments" in _succeeds("inspect", made / "imported")
    shown = _succeeds("inspect", made / "exported")
    assert "BF16 in 1 files" in shown
    assert "; 35,136 parameters" in shown
    assert "from-hf takes it" in shown


def test_from_hf_says_when_a_checkpoint_is_for_the_exports_own_tokenizer(
    made: Path, tmp_path: Path
) -> None:
    shown = _succeeds("from-hf", "--model", made / "exported", "--output", tmp_path / "start")
    first_line = shown.partition("\n")[0]
    assert f"for data made with {made / 'exported' / 'tokenizer.json'}" in first_line
    assert "--tokenizer data/my.model" in first_line


def _without_manifest(folder: Path) -> None:
    (folder / "run" / "checkpoints" / "step_00000010" / "manifest.json").unlink()


def _of_another_program(folder: Path, **changes: Any) -> None:
    """Change fields of the state, its checksum included; `...` takes one away."""
    checkpoint = folder / "run" / "checkpoints" / "step_00000010"
    manifest = verified_manifest(checkpoint)
    state = {**manifest.state, **changes}
    kept = {name: value for name, value in state.items() if value is not ...}
    Manifest(manifest.step, manifest.files, kept).write(checkpoint)


def _with_another_curriculum(folder: Path) -> None:
    state: Any = Manifest.read(folder / "run" / "checkpoints" / "step_00000010").state
    _of_another_program(folder, config={**state["config"], "curriculum": [{"length": 3}]})


def _without_mask(folder: Path) -> None:
    path = folder / "tiny.model"
    path.write_bytes(path.read_bytes().replace(b"<MASK>", b"<mask>"))


def _another_architecture(folder: Path) -> None:
    path = folder / "exported" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "bert"}))


INSPECT = ("inspect", "{}/run/checkpoints/step_00000010")
TO_HF = ("to-hf", "--checkpoint", "{}/run/checkpoints/step_00000010", "--output", "{}/new")
FROM_HF = ("from-hf", "--model", "{}/exported", "--output", "{}/new")


@pytest.mark.parametrize(
    ("damage", "arguments", "parts"),
    [
        (_without_manifest, TO_HF, ["step_00000010: has no manifest.json"]),
        (
            partial(_of_another_program, config=...),
            TO_HF,
            ["manifest.json: has no state.config"],
        ),
        (
            partial(_of_another_program, tokenizer_hash=[1]),
            TO_HF,
            ["manifest.json: state.tokenizer_hash is [1], not what a training run writes there"],
        ),
        (
            partial(_of_another_program, consumed_rows="many"),
            INSPECT,
            ["manifest.json: state.consumed_rows is 'many'"],
        ),
        (_with_another_curriculum, TO_HF, ["manifest.json: its state is not that of a training"]),
        (_without_mask, TO_HF, ["tiny.model has no special piece <MASK>"]),
        (_another_architecture, FROM_HF, ["config.json: model_type is 'bert'"]),
        (
            _without_mask,
            (*FROM_HF, "--tokenizer", "{}/tiny.model"),
            ["tiny.model has no special piece <MASK>"],
        ),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    made: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    arguments: tuple[str, ...],
    parts: list[str],
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    damage(folder)
    before = sorted(path.name for path in folder.iterdir())
    # The checkpoint says where its tokenizer lay; it has moved.
    extra = ("--tokenizer", "{}/tiny.model") if arguments[0] == "to-hf" else ()
    refused = _tool(*(text.format(folder) for text in (*arguments, *extra)))
    assert refused.returncode == 2, refused.stderr
    assert all(line.startswith("error: ") for line in refused.stderr.splitlines())
    for part in parts:
        assert part in refused.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_licence_that_is_none_is_refused(made: Path) -> None:
    refused = _tool(*(text.format(made) for text in TO_HF), "--license", "My licence")
    assert refused.returncode == 2
    assert "--license = 'My licence': no identifier of the Hub; give one" in refused.stderr
