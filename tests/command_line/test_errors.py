from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli
from megatron_bert.errors import ConfigError, DataError, RunError
from tests.deadlines import DEADLINE_SECONDS

CHECKOUT = Path(__file__).resolve().parents[2]


def _refuse() -> int:
    raise DataError("no such thing; use another")


def _succeed() -> None:
    return None


def test_a_user_error_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_cli(_refuse)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; use another\n"


def test_each_line_of_a_user_error_is_marked_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise DataError("2 problems:\n  this\n  that")

    with pytest.raises(SystemExit):
        run_cli(refuse)
    assert capsys.readouterr().err == "error: 2 problems:\nerror:   this\nerror:   that\n"


@pytest.mark.parametrize("arguments", [["--count=many"], ["go", "--far=1"], ["--none"]])
def test_a_command_line_that_cannot_be_read_is_told_as_any_other_refusal(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="tool.py")
    parser.add_argument("--count", type=int)
    parser.add_subparsers().add_parser("go").add_argument("--far", choices=["2"])
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: parser.parse_args(arguments) and None)
    assert left.value.code == 2
    usage, *_, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: tool.py")
    assert line.startswith("error: ")
    assert arguments[-1].split("=")[0] in line
    assert line.endswith("--help")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], None),
        (["--steps", "5"], None),
        (["--steps", "0"], "--steps 0"),
        (["--lengths", "1", "2"], "--lengths 1 2"),
        (["--text"], "--text"),
        (["a=1", "b=2"], "a=1 b=2"),
        (["--micro-tokens", "0"], "--micro-tokens 0"),
    ],
)
def test_what_would_have_no_effect_is_refused_with_its_value_and_what_gives_it_one(
    arguments: list[str], told: str | None
) -> None:
    parser = Parser(prog="tool.py")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro-tokens", type=int)
    parser.add_argument("--lengths", nargs="+")
    parser.add_argument("--text", action="store_true")
    names = ("overrides", "--steps", "--micro-tokens", "--lengths", "--text")
    given = parser.parse_args(arguments)
    parser.check_purposes(given, [(name, True, "") for name in names])
    purposes = [(name, False, "give --far") for name in names]
    if told is None:
        parser.check_purposes(given, purposes)
        return
    with pytest.raises(ConfigError) as refused:
        parser.check_purposes(given, purposes)
    assert str(refused.value) == f"{told}: would have no effect; give --far, or leave it out"


def test_an_option_is_not_taken_by_a_part_of_its_name() -> None:
    parser = Parser(prog="tool.py")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_subparsers().add_parser("go").add_argument("--restart", action="store_true")
    for arguments in (["--overwrit"], ["go", "--rest"]):
        with pytest.raises(ConfigError, match=f"unrecognized arguments: {arguments[-1]}; see"):
            parser.parse_args(arguments)


def test_every_command_line_is_read_by_the_parser_that_tells_so() -> None:
    folders = [CHECKOUT / "megatron_bert", CHECKOUT / "tools", CHECKOUT / "examples"]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    others = [path for path in files if "argparse.ArgumentParser(" in path.read_text("utf-8")]
    assert others == []


@pytest.mark.parametrize(
    ("interrupt", "line"),
    [(KeyboardInterrupt(), "interrupted"), (KeyboardInterrupt("nothing saved"), "nothing saved")],
)
def test_an_interrupt_is_one_line_and_exit_code_one(
    interrupt: KeyboardInterrupt, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait() -> None:
        raise interrupt

    with pytest.raises(SystemExit) as left:
        run_cli(wait)
    assert left.value.code == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_what_ends_a_run_is_lines_with_its_details_and_exit_code_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        error = RunError("rank 1 is gone")
        error.add_note("connection closed")
        raise error

    with pytest.raises(SystemExit) as left:
        run_cli(fail)
    assert left.value.code == 1
    assert capsys.readouterr().err == "error: rank 1 is gone\nerror: connection closed\n"


def test_what_nobody_foresaw_ends_in_a_line_behind_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("no rows")

    with pytest.raises(SystemExit) as left:
        run_cli(fail)
    assert left.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("error: ZeroDivisionError: no rows\n")


def test_a_package_that_is_not_installed_is_named_with_the_python_that_lacks_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    with pytest.raises(SystemExit) as left:
        run_cli(main)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: torch is not installed for {sys.executable}; activate ")
    assert error.count("\n") == 1


def test_success_is_exit_code_zero() -> None:
    with pytest.raises(SystemExit) as left:
        run_cli(_succeed)
    assert left.value.code == 0


def test_a_reader_that_went_away_is_no_error() -> None:
    program = (
        "import sys; from megatron_bert.command_line.run import run_cli\n"
        "def main():\n    for _ in range(10**5): sys.stdout.write('line\\n')\n"
        "run_cli(main)\n"
    )
    command = f'"{sys.executable}" -c "$PROGRAM" | head -n 1'
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=CHECKOUT,
        env={"PROGRAM": program, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "line\n", "")
