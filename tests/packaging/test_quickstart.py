"""The first of the README's two commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SHORT = (
    *(f"curriculum.{stage}.steps=1" for stage in range(4)),
    "batch.global_size=2",
    "model.hidden_size=32",
)


def quickstart(*arguments: str | Path, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", CHECKOUT / "examples" / "quickstart.sh", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_it_explains_itself() -> None:
    result = quickstart("--help")
    assert result.returncode == 0
    assert "usage: bash examples/quickstart.sh" in result.stdout


@pytest.mark.parametrize("argument", ["--gpu", "nowhere.jsonl"])
def test_what_it_does_not_know_is_refused_before_anything_is_installed(argument: str) -> None:
    result = quickstart(argument)
    assert result.returncode == 2
    assert f"error: {'unknown flag ' if argument[0] == '-' else ''}{argument}" in result.stderr


def test_keys_that_the_script_sets_itself_are_refused() -> None:
    result = quickstart("run.dir=elsewhere")
    assert result.returncode == 2
    assert "error: run.dir=elsewhere: run.dir and data are set by this script" in result.stderr


@pytest.fixture
def corpus(tiny_texts: list[str], tmp_path: Path) -> Iterator[Path]:
    """Own text in a folder whose name has blanks and kanji; what is made of it is removed."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("no virtual environment is active: the script would make one")
    folder = tmp_path / "作業 場所"
    folder.mkdir()
    path = folder / "my text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    before = set((CHECKOUT / "runs").glob("quickstart-*"))
    yield path
    for made in set((CHECKOUT / "runs").glob("quickstart-*")) - before:
        shutil.rmtree(made)


@pytest.mark.slow
def test_own_text_becomes_a_model_that_fills_masks_and_a_second_call_reuses_it(
    corpus: Path,
) -> None:
    first = quickstart(corpus.name, *SHORT, cwd=corpus.parent)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "the right word was among the first 5 in" in first.stdout
    (place,) = (line.split()[-1] for line in first.stdout.splitlines() if "lands in" in line)
    for name in ("loss.png", "report.html", "huggingface/model.safetensors", "run/FINISHED"):
        assert (CHECKOUT / place / name).is_file(), name
    again = quickstart(corpus.name, *SHORT, cwd=corpus.parent)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("stands already") == 6
    assert "token slots  " not in again.stdout.split("6/8")[0]
