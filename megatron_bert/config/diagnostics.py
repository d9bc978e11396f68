"""Validation errors as lines that a user can act on: key, value, place, what is expected."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_bert.config.keys import children, dotted, expected_at, key_at, nearest_keys, pattern
from megatron_bert.config.yaml_text import KeyPath
from megatron_bert.errors import ConfigError

_LONGEST_VALUE = 80


def format_value(value: Any) -> str:
    """A value as it would be written in YAML, cut to a readable length."""
    text = (
        value
        if isinstance(value, str) and value
        else json.dumps(value, default=str, ensure_ascii=False)
    )
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def raise_problems(problems: Sequence[str], source: str) -> None:
    """Raise all problems as one `ConfigError`; nothing happens if there are none."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in {source}:{lines}")


def explain(error: ValidationError, places: Mapping[KeyPath, str]) -> list[str]:
    """Turn what pydantic found into one line per problem.

    Args:
        error: The failed validation of the whole tree.
        places: For each given path, where it was given: file and line, or the command line.

    Returns:
        Lines with the dotted key, its value, what is expected and the nearest right name.
    """
    # pydantic counts only a list's valid entries: if one is refused, the list is not at fault.
    details = [
        item
        for item in error.errors(include_url=False)
        if item["type"] != "too_short" or not item["input"]
    ]
    unknown = [_deepest(item) for item in details if item["type"] == "extra_forbidden"]
    suggested = {name for path, _ in unknown for name in nearest_keys(path)}
    has_unknown_preset = any(item["loc"] == ("model", "preset") for item in details)
    lines = [_unknown_key(path, value, places) for path, value in unknown]
    for item in details:
        path = item["loc"]
        if item["type"] == "extra_forbidden":
            continue
        if item["type"] == "missing":
            # One line per mistake: these are missing only because a name was misspelt.
            if dotted(path) in suggested or (has_unknown_preset and path[0] == "model"):
                continue
            lines.append(_missing_key(path))
        else:
            lines.append(_wrong_value(path, item["input"], places))
    return lines


def _deepest(item: ErrorDetails) -> tuple[KeyPath, Any]:
    """Follow sections with a single key, so that `optimzer.lr=1` is named as it was typed."""
    path, value = item["loc"], item["input"]
    while isinstance(value, dict) and len(value) == 1:
        [(name, value)] = value.items()
        path = (*path, name)
    return path, value


def _unknown_key(path: KeyPath, value: Any, places: Mapping[KeyPath, str]) -> str:
    near = nearest_keys(path)
    if len(near) > 1:
        remedy = f"did you mean one of {', '.join(near)}?"
    elif near:
        remedy = f"did you mean {near[0]}?"
    else:
        parent = path[:-1]
        while parent and not children(pattern(parent)):
            parent = parent[:-1]
        where = f"{dotted(parent)} has" if parent else "the configuration has"
        remedy = f"{where} {', '.join(children(pattern(parent)))}"
    return f"{_given(path, value, places)}: unknown key; {remedy}"


def _missing_key(path: KeyPath) -> str:
    key = key_at(path)
    what = f" ({key.description.rstrip('.')})" if key else ""
    return f"{dotted(path)} is missing: give {expected_at(path)}{what}"


def _wrong_value(path: KeyPath, value: Any, places: Mapping[KeyPath, str]) -> str:
    expected, key = expected_at(path), key_at(path)
    hint = _hint(expected, value, key.default if key else None)
    return f"{_given(path, value, places)}: expected {expected}{hint}"


def _given(path: KeyPath, value: Any, places: Mapping[KeyPath, str]) -> str:
    # Text is shown in quotes, because `"48"` where 48 was expected is the very mistake to show.
    shown = _cut(json.dumps(value, default=str, ensure_ascii=False))
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return f"{dotted(path)} = {shown} ({places[path[:length]]})"
    return f"{dotted(path)} = {shown}"


def _hint(expected: str, value: Any, default: Any) -> str:
    """The remedy for values that look right but are of another type in YAML, or an example."""
    if "true" in expected.replace(",", "").split() and isinstance(value, str):
        meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower())
        if meant:
            return f"; write {meant}"
    if expected.startswith("an integer") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if expected.startswith(("an integer", "a number")) and isinstance(value, str | float):
        number = _number(value)
        if number is not None and not math.isfinite(number):
            return f"; give a finite one{_example(default)}"
        if isinstance(value, str):
            return _example(default) if number is None else "; write it without quotes"
    if expected.startswith("non-empty text") and isinstance(value, bool | int | float):
        return f'; quote it: "{format_value(value)}"'
    if expected.startswith("one of") and isinstance(value, str):
        options = expected.removeprefix("one of ").removesuffix(" or null").split(", ")
        near = difflib.get_close_matches(value, options, n=1)
        return f"; did you mean {near[0]}?" if near else ""
    return ""


def _example(default: Any) -> str:
    return "" if default is None else f", e.g. {format_value(default)}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
