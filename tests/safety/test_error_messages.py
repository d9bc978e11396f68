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

_PASSED_ON = "the texts of other errors, each of which is looked at where it is made"
# By file and function: why what stands there need not be complete.
EXCEPTIONS = {
    ("megatron_bert/checkpoint/saver.py", "_begin"): "what reserves the memory says what to do",
    ("megatron_bert/checkpoint/saver.py", "_check"): "ends a save that nobody waits for",
    ("megatron_bert/checkpoint/store.py", "_verify"): _PASSED_ON,
    ("megatron_bert/config/checks.py", "_place_problems"): "place_problem says what to do",
    ("megatron_bert/config/checks.py", "shell_problems"): "shell_problem says what to do",
    ("megatron_bert/config/diagnostics.py", "raise_problems"): _PASSED_ON,
    ("megatron_bert/config/places.py", "check_place"): "place_problem says what to do",
    ("megatron_bert/data/parsing.py", "_line_error"): "LineError's text adds what to do",
    ("megatron_bert/distributed/agreement.py", "_values"): _PASSED_ON,
    ("megatron_bert/jobs/layout.py", "layout_keys"): _PASSED_ON,
    ("megatron_bert/planner/search.py", "make_plan"): _PASSED_ON,
    ("megatron_bert/training/dry_run.py", "dry_run"): _PASSED_ON,
}


def test_each_error_names_a_value_and_a_remedy() -> None:
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
        ('raise DataError("WORLD_SIZE is above 1: start it with python")', None),
        ('remedy = "use another"\nraise UserError(f"{path}: is taken; {remedy}")', None),
        ('raise DataError(f"{path}: damaged")', "no remedy: '{}: damaged'"),
        ('raise DataError(f"{path}: of no use")', "no remedy: '{}: of no use'"),
        (
            'raise DataError("damaged; copy it again")',
            "no value, option or key: 'damaged; copy it again'",
        ),
        ('class Odd(DataError): ...\nraise Odd(f"{path}: odd")', "no remedy: '{}: odd'"),
        ('def x_problems():\n    yield f"{key}: too small"', "no remedy: '{}: too small'"),
        (
            'def fail(hint):\n    raise UserError(f"{path}; {hint}")\nfail("use it")\nfail("pity")',
            "no remedy: '{}; pity'",
        ),
        ('raise ValueError("not for users")', "nothing"),
    ],
)
def test_what_a_message_lacks_is_told(source: str, lacks: str | None, tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text("class UserError: ...\nclass DataError(UserError): ...\n")
    (tmp_path / "x.py").write_text(source)
    messages = user_errors(tmp_path, [tmp_path / "errors.py", tmp_path / "x.py"])
    assert [message.lacks() for message in messages] == ([] if lacks == "nothing" else [lacks])
