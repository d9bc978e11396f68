"""A command line that is started with a Python without the project's packages says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import DEADLINE_SECONDS

CHECKOUT = Path(__file__).resolve().parents[2]
COMMANDS = [
    # finetune_jglue.py names the packages of an extra together: test_finetune_jglue.py.
    *sorted(set((CHECKOUT / "tools").glob("*.py")) - {CHECKOUT / "tools" / "finetune_jglue.py"}),
    CHECKOUT / "examples" / "fill_masks.py",
    CHECKOUT / "pretrain_bert.py",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_a_package_that_is_missing_is_told_in_one_line_with_what_to_do(command: Path) -> None:
    # Without its `site` module Python finds no installed package, and PYTHONPATH is not obeyed.
    done = subprocess.run(
        [sys.executable, "-S", "-E", command, "--config", "x"],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 2
    told = re.escape(sys.executable)
    assert re.fullmatch(
        rf"error: \w+ is not installed for {told}; activate the environment that has it "
        rf"\(source .venv/bin/activate\), or install it: pip install -e \.\n",
        done.stderr,
    ), done.stderr
