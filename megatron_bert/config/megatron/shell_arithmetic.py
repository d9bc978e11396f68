"""The shell's arithmetic, `$((A * 2))`, in whole numbers with + - * / % and parentheses."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    # As in C: towards 0.
    ast.Div: lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    ast.Mod: lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
}
_OPENING = "$(("
# What braces and dollars there are is a variable's; names are looked up.
_VARIABLE = re.compile(r"\$?\{?([A-Za-z_]\w*|(?<=\$)\d+|(?<=\$\{)\d+)\}?")
_LONGEST = 500


def with_results(text: str, value_of: Callable[[str], str | None]) -> str:
    """Put in the result of each `$((...))` that can be computed, into others what is known.

    Args:
        text: part of a shell's command.
        value_of: a variable's value by its name; None where nobody knows it.
    """
    # From the last one on, so that those within others come first.
    start = text.rfind(_OPENING)
    while start >= 0:
        end = _end(text, start)
        if end is not None:
            inner = text[start + 3 : end - 2]
            result = _compute(inner, value_of)
            put_in = f"$(({_with_numbers(inner, value_of)}))" if result is None else str(result)
            text = f"{text[:start]}{put_in}{text[end:]}"
        start = text.rfind(_OPENING, 0, start)
    return text


def _end(text: str, start: int) -> int | None:
    """Behind the `))` that closes what opens at `start`."""
    depth = 0
    for index in range(start + 1, min(len(text), start + _LONGEST)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1 if text[index - 1] == ")" else None
    return None


def _with_numbers(text: str, value_of: Callable[[str], str | None]) -> str:
    """What is unknown keeps its name."""

    def number(match: re.Match[str]) -> str:
        value = value_of(match[1])
        return value if value is not None and re.fullmatch(r"-?\d+", value) else match[0]

    return _VARIABLE.sub(number, text)


def _compute(text: str, value_of: Callable[[str], str | None]) -> int | None:
    plain = _VARIABLE.sub(lambda match: f"({value_of(match[1])})", text)
    if len(plain) > _LONGEST:
        return None
    try:
        return _value(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
    raise ValueError(f"{type(node).__name__} is none of the shell's whole numbers")
