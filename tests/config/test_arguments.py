"""Messages call an argument what its caller calls it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_bert.config.arguments import argument, as_options
from megatron_bert.config.errors import DataError, run_cli


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
