"""What the repository holds, and what it must not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("megatron_bert", "csrc", "tools", "tests", "examples", "launch")
SOURCE_SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".sh", ".yaml", ".md", ".json", ".jsonl", ".txt"}

# Folders where one machine's users and mounts live; not inside a longer word or a URL.
PLACES = "|".join(("home", "root", "work", "Users", "mnt", "scratch"))
MACHINE_PATH = re.compile(rf"(?<![\w.~$}}/-])/(?:{PLACES})/\w")


def list_files(*options: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", *options], cwd=CHECKOUT, capture_output=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [Path(name.decode()) for name in listing.stdout.split(b"\0") if name]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for name in list_files("--cached", "--others", "--exclude-standard"):
        path = CHECKOUT / name
        if not path.is_file() or b"\0" in (content := path.read_bytes()):
            continue
        found += [
            f"{name}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1)
            if MACHINE_PATH.search(line)
        ]
    assert found == []


def test_git_ignores_no_source_file() -> None:
    ignored = list_files("--others", "--ignored", "--exclude-standard", "--", *SOURCE_FOLDERS)
    assert [str(name) for name in ignored if name.suffix in SOURCE_SUFFIXES] == []


@pytest.mark.parametrize("script", ["pretrain_bert.py", "tools/split_corpus.py"])
def test_a_script_that_runs_another_checkouts_code_says_so_in_one_line(
    script: str, tmp_path: Path
) -> None:
    own = _help(CHECKOUT / script)
    assert own.stderr == ""
    copied = tmp_path / script
    copied.parent.mkdir(exist_ok=True)
    copied.write_bytes((CHECKOUT / script).read_bytes())
    # No checkout: a script of the installed package's user.
    assert _help(copied).stderr == ""
    (tmp_path / "megatron_bert").mkdir()
    (tmp_path / "megatron_bert/__init__.py").touch()
    other = _help(copied)
    assert (other.returncode, other.stdout) == (0, own.stdout)
    (line,) = other.stderr.splitlines()
    assert f"runs the code of {CHECKOUT / 'megatron_bert'}, not that of {tmp_path}" in line
    assert f"pip install -e {tmp_path}" in line


def _help(script: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with this checkout's package, which an editable install finds first."""
    run = "import megatron_bert, runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"
    run = f"import sys; sys.argv = {[str(script), '--help']!r}; {run}"
    return subprocess.run(
        [sys.executable, "-c", run], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
