"""Messages call an argument what its caller calls it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megatron_bert
from megatron_bert.command_line.arguments import argument, as_options
from megatron_bert.command_line.run import run_cli
from megatron_bert.errors import DataError


@pytest.mark.parametrize(
    ("given", "from_python", "on_a_command_line"),
    [
        (("json_key",), "json_key", "--json-key"),
        (("on_error", "skip"), "on_error='skip'", "--on-error skip"),
        (("restart", True), "restart=True", "--restart"),
        (("inputs",), "inputs", "--input"),
        (("field_keys",), "field_keys", "--field-key"),
    ],
)
def test_an_argument_has_the_name_that_its_caller_gives_it(
    given: tuple[Any, ...], from_python: str, on_a_command_line: str
) -> None:
    assert argument(*given) == from_python
    with as_options():
        assert argument(*given) == on_a_command_line
    assert argument(*given) == from_python


class _SaidLaterError(DataError):
    def __str__(self) -> str:
        return f"no key; name it with {argument('json_key')}"


def test_a_command_line_tells_what_its_main_raises_in_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        raise _SaidLaterError

    with pytest.raises(SystemExit):
        run_cli(main)
    assert capsys.readouterr().err == "error: no key; name it with --json-key\n"
    assert argument("json_key") == "json_key"


_PACKAGE = Path(megatron_bert.__file__).parent
_TOOL_ALONE = "nothing but its tool calls it"
_DECLARES = "declares or reads a command line"
_STARTS = "writes a command line that it starts"
# Files and folders whose texts no Python caller sees; folders end in a slash.
_OF_COMMAND_LINES = {
    "benchmark/": _TOOL_ALONE,
    "command_line/arguments.py": "the table of options itself",
    "command_line/emitted_tables.py": _DECLARES,
    "command_line/parser.py": _DECLARES,
    "data/text_arguments.py": _DECLARES,
    "jglue/": _TOOL_ALONE,
    "jobs/__main__.py": _DECLARES,
    "run/mirrors/__main__.py": _DECLARES,
    "run/mirrors/processes.py": _STARTS,
    "training/main.py": _DECLARES,
    "translation/": "its subject is Megatron-LM's options",
}
# A command that is written out means the same to everybody.
_COMMAND = re.compile(r"(?:tools/\w+\.py|pretrain_bert\.py|torchrun|pip install)[^;.]*")
_OPTION = re.compile(r"--[a-z][a-z-]*")


def _texts(source: str) -> Iterator[str]:
    """Every text of a module that is no docstring, with `{}` for what it is filled with."""
    inside = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            inside.update(parts)
            yield "".join(str(p.value) if p in parts else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def test_a_text_that_a_python_caller_may_see_names_no_option_of_a_command_line() -> None:
    found = {}
    for path in sorted(_PACKAGE.rglob("*.py")):
        texts = _texts(path.read_text(encoding="utf-8"))
        options = [option for text in texts for option in _OPTION.findall(_COMMAND.sub("", text))]
        if options:
            found[path.relative_to(_PACKAGE).as_posix()] = options
    told = {
        name: [place for place in _OF_COMMAND_LINES if name.startswith(place)] for name in found
    }
    assert {name: found[name] for name, places in told.items() if not places} == {}
    assert {place for places in told.values() for place in places} == set(_OF_COMMAND_LINES)


def test_an_option_outside_a_command_is_found() -> None:
    source = '"""--a"""\nx = f"{a}: give --b or tools/x.py --c {a} --d; or --e"\ny = "--f"'
    assert [_OPTION.findall(_COMMAND.sub("", text)) for text in _texts(source)] == [
        ["--b", "--e"],
        ["--f"],
    ]
