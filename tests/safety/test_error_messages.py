"""Every error that a user can mend says what is wrong with which value, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.safety.error_messages import CHECKOUT, user_errors

FILES = [
    *(CHECKOUT / "megatron_bert").rglob("*.py"),
    *(CHECKOUT / "tools").glob("*.py"),
    CHECKOUT / "pretrain_bert.py",
]

_ASKER_SAYS = "who asks puts the key and the path first"
_PASSED_ON = "the texts of other errors, each of which is looked at where it is made"
# By file and function: why what stands there need not be complete.
EXCEPTIONS = {
    ("megatron_bert/checkpoint/saver.py", "_begin"): "what reserves the memory says what to do",
    ("megatron_bert/checkpoint/saver.py", "_check"): "ends a save that nobody waits for",
    ("megatron_bert/checkpoint/store.py", "_verify"): _PASSED_ON,
    ("megatron_bert/config/checks.py", "_place_problems"): "place_problem says what to do",
    ("megatron_bert/config/checks.py", "shell_problems"): "shell_problem says what to do",
    ("megatron_bert/config/diagnostics.py", "raise_problems"): _PASSED_ON,
    ("megatron_bert/command_line/places.py", "check_place"): "place_problem says what to do",
    ("megatron_bert/command_line/parser.py", "error"): "argparse names option and value",
    ("megatron_bert/command_line/places.py", "place_problem"): _ASKER_SAYS,
    ("megatron_bert/command_line/places.py", "shell_problem"): _ASKER_SAYS,
    ("megatron_bert/data/parsing.py", "_line_error"): "LineError's text adds what to do",
    ("megatron_bert/distributed/agreement.py", "_values"): _PASSED_ON,
    ("megatron_bert/jobs/layout.py", "fitting_layout"): _PASSED_ON,
    ("megatron_bert/planner/search.py", "make_plan"): _PASSED_ON,
    ("megatron_bert/training/dry_run.py", "dry_run"): _PASSED_ON,
}


def test_each_error_names_a_thing_its_value_and_a_remedy() -> None:
    messages = user_errors(CHECKOUT, FILES)
    assert len(messages) > 250
    lacking = [message for message in messages if message.lacks()]
    places = {(message.file, message.function) for message in lacking}
    assert [
        f"{message.file}:{message.line}: {message.lacks()}"
        for message in lacking
        if (message.file, message.function) not in EXCEPTIONS
    ] == []
    assert EXCEPTIONS.keys() - places == set()


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ('raise DataError(f"{path}: damaged; copy it again")', None),
        ('raise DataError(f"WORLD_SIZE = {ranks}: start it with python")', None),
        ('raise DataError(f"tokenizer {given}: use another")', None),
        ('raise DataError("data.valid = [] and data.held_out = 0; set one of them")', None),
        ('raise DataError("--steps: not in the run; give others")', "no value"),
        ('raise DataError(f"{steps} is too large; give less")', "no thing"),
        ('raise DataError(f"too large; give --steps {least} or more")', "no thing"),
        ('add("--text", action="store_true")\nraise DataError("--text: odd; give --steps")', None),
        ('remedy = "use another"\nraise UserError(f"{path}: is taken; {remedy}")', None),
        ('raise DataError(f"{path}: damaged")', "no remedy: '{path}: damaged'"),
        ('raise DataError(f"{path}: of no use")', "no remedy: '{path}: of no use'"),
        (
            'raise DataError("damaged; copy it again")',
            "no thing: 'damaged; copy it again'",
        ),
        ('class Odd(DataError): ...\nraise Odd(f"{path}: odd")', "no remedy: '{path}: odd'"),
        ('def x_problems():\n    yield f"{key}: too small"', "no remedy: '{key}: too small'"),
        (
            'def fail(hint):\n    raise UserError(f"{path}; {hint}")\nfail("use it")\nfail("pity")',
            "no remedy: '{path}; pity'",
        ),
        ('raise ValueError("not for users")', "nothing"),
    ],
)
def test_what_a_message_lacks_is_told(source: str, lacks: str | None, tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text("class UserError: ...\nclass DataError(UserError): ...\n")
    (tmp_path / "x.py").write_text(source)
    messages = user_errors(tmp_path, [tmp_path / "errors.py", tmp_path / "x.py"])
    found = [message.lacks() for message in messages]
    if lacks is None or lacks == "nothing":
        assert found == ([] if lacks else [None])
    else:
        (only,) = found
        assert only is not None
        assert only.startswith(lacks)


def test_a_remedy_that_other_modules_give_to_a_public_function_is_part_of_its_message(
    tmp_path: Path,
) -> None:
    sources = {
        "errors": "class UserError: ...",
        "checks": (
            'def check(path, remedy):\n    raise UserError(f"{path}: is taken; {remedy}")\n'
            'def _check(path, remedy):\n    raise UserError(f"{path}: is taken; {remedy}")\n'
            '_check(path, "use another")'
        ),
        "callers": (
            'def f():\n    remedy = "use another"\n    check(path, remedy)\n'
            'check(path, remedy="pity")\n_check(path, "pity")'
        ),
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    check, private = user_errors(tmp_path, sorted(tmp_path.iterdir()))
    assert check.texts == ("{path}: is taken; use another", "{path}: is taken; pity")
    assert check.lacks() == "no remedy: '{path}: is taken; pity'"
    assert private.texts == ("{path}: is taken; use another",)
