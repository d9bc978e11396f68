"""Nothing here executes what a file holds: the linter forbids most ways, these tests the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = [
    CHECKOUT / "pretrain_bert.py",
    *(
        path
        for room in ("megatron_bert", "tools", "examples")
        for path in (CHECKOUT / room).rglob("*.py")
    ),
]
# Their files are pickles, or code.
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "runpy", "shelve"}
CALLS = {
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "np.load",
    "numpy.load",
    "importlib.util.spec_from_file_location",
}
OPTIONS = {"allow_pickle", "trust_remote_code"}
# A user may give leave, by --trust-remote-code.
WITH_LEAVE = (
    CHECKOUT / "megatron_bert" / "jglue" / "models.py",
    "trust_remote_code=self.trust_remote_code",
)


def ways(source: str) -> Iterator[str]:
    """Everything in a module that may execute what a file holds, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found = [module] if module.partition(".")[0] in MODULES else sorted(names & CALLS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = [ast.unparse(option) for option in node.keywords if option.arg in OPTIONS]
            found = [name] if name in CALLS else given
        else:
            continue
        yield from (f"line {node.lineno}: {way}" for way in found)


def test_nothing_here_executes_what_a_file_holds() -> None:
    assert len(SOURCES) > 100
    found = [
        f"{path}, {way}"
        for path in SOURCES
        for way in ways(path.read_text())
        if (path, way.partition(": ")[2]) != WITH_LEAVE
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "from torch import load",
        "from numpy import load",
        "np.load(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.fromfile(path, allow_pickle=False)",
    ],
)
def test_each_way_would_be_found(line: str) -> None:
    assert len(list(ways(line))) == 1
