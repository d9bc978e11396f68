"""The example notebook, executed cell by cell; no Jupyter is needed for that."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import DEADLINE_SECONDS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
CODE: list[dict[str, Any]] = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
# As Jupyter runs them: each compiled by itself, one after the other, in the same names; the first
# that fails ends it, and is named. An expression at a cell's end is shown.
RUN_CELLS = """
import ast, json, sys
names = {"__name__": "__main__"}
for name, source in json.load(sys.stdin):
    print("cell", name, flush=True)
    program = ast.parse(source, name)
    shown = program.body.pop() if isinstance(program.body[-1], ast.Expr) else None
    exec(compile(program, name, "exec"), names)
    if shown is not None:
        repr(eval(compile(ast.Expression(shown.value), name, "eval"), names))
"""


def test_the_file_is_a_notebook_of_format_4_5() -> None:
    """The keys that its schema (nbformat.v4.5.schema.json) asks for, and no others."""
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert {"name", "display_name"} <= NOTEBOOK["metadata"]["kernelspec"].keys()
    for cell in NOTEBOOK["cells"]:
        is_code = cell["cell_type"] == "code"
        assert is_code or cell["cell_type"] == "markdown"
        expected = {"cell_type", "id", "metadata", "source"}
        assert cell.keys() == expected | ({"execution_count", "outputs"} if is_code else set())
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert isinstance(cell["metadata"], dict)
        # A list of lines, each but the last with its end.
        assert all(isinstance(line, str) for line in cell["source"])
        assert "".join(cell["source"]).splitlines(keepends=True) == cell["source"]
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)


def test_the_notebook_is_kept_without_outputs() -> None:
    assert [(cell["outputs"], cell["execution_count"]) for cell in CODE] == [([], None)] * len(CODE)


def test_every_cell_is_a_program_of_its_own() -> None:
    """Neither a statement that goes on in the next cell, nor one that only Jupyter knows."""
    for cell in CODE:
        ast.parse("".join(cell["source"]), cell["id"])


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs_in_order(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    shutil.copytree(EXAMPLES / "corpus", tmp_path / "corpus")
    checks = """
assert list(first) == list(range(1, 9)) and len(losses) == 20
assert losses[-1] < losses[0] - 0.5
assert "optimizer.learning_rate" in mistake and "optimizer has name, lr" in mistake
assert "[<MASK>|" in rows
assert logits.shape[:2] == inputs["input_ids"].shape
"""
    cells = [(cell["id"], "".join(cell["source"])) for cell in CODE]
    done = subprocess.run(
        [sys.executable, "-c", RUN_CELLS],
        input=json.dumps([*cells, ("checks", checks)]),
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"^cell (\S+)$", done.stdout, re.MULTILINE)
    assert ran == [*(name for name, _ in cells), "checks"]
