"""What the repository holds, and what it must not."""

from __future__ import annotations

import re
import subprocess
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
