"""Checks Python callers' arguments against annotations; command lines have a parser for that."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from megatron_bert.command_line.arguments import argument
from megatron_bert.errors import UserError
from megatron_bert.files import StrPath

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_LONGEST_VALUE = 80
_WORDS = {
    bool: "True or False",
    bytes: "bytes",
    float: "a number",
    int: "a whole number",
    os.PathLike: "a pathlib.Path",
    str: "text",
    type(None): "None",
    Mapping: "a dict",
    # Types whose name alone does not tell how to get an instance.
    "Config": "a Config, which load_config and build_config return",
    "PreprocessOptions": "PreprocessOptions(...)",
    "RunRecords": "RunRecords, which train and RunRecords.read return",
    "Shard": "a Shard, e.g. megatron_bert.data.shards.Shard(0, 8), the first of eight",
}
_MANY = {int: "whole numbers", str: "texts", StrPath: "paths"}


def checked(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Make a function refuse arguments that do not match its annotations, before it runs.

    Integers of other libraries (NumPy's, a one-element tensor) are converted to int, also within a
    list. Bounds are pydantic's (`PositiveInt`). The items of an `Iterable` are checked as they are
    consumed.

    Raises:
        UserError: raised by the returned function; names the argument, its value and what to give.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        # Without the return annotation, which may name types that only a type checker knows.
        taken = {
            name: parameter.annotation
            for name, parameter in signature.parameters.items()
            if parameter.annotation is not parameter.empty
        }
        return typing.get_type_hints(
            types.SimpleNamespace(__annotations__=taken),
            function.__globals__,
            include_extras=True,
        )

    @functools.wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints():
                bound.arguments[name] = _converted(hints()[name], value, argument(name))
        return function(*bound.args, **bound.kwargs)

    return call


def check_fields(record: Any) -> None:
    """Check and convert the fields of a dataclass, frozen or not, as `checked` does arguments.

    Raises:
        UserError: a field's value is not what its annotation says.
    """
    hints = typing.get_type_hints(type(record), include_extras=True)
    for field in dataclasses.fields(record):
        value = _converted(hints[field.name], getattr(record, field.name), argument(field.name))
        object.__setattr__(record, field.name, value)


class _RefusedError(UserError):
    """The value of `name` does not match its annotation; `is_close` if at least its type does."""

    def __init__(self, message: str, name: str, is_close: bool) -> None:
        super().__init__(message)
        self.name, self.is_close = name, is_close


def _refused(name: str, value: object, expected: str, *, is_close: bool = False) -> _RefusedError:
    shown = repr(value)
    if len(shown) > _LONGEST_VALUE:
        shown = f"{shown[: _LONGEST_VALUE - 3]}..."
    return _RefusedError(f"{name} = {shown}: give {expected}", name, is_close)


def _converted(hint: Any, value: Any, name: str) -> Any:
    """The value, converted to the annotated type."""
    kind = get_origin(hint) or hint
    if kind is Annotated:
        inner, *bounds = get_args(hint)
        return _bounded(bounds, _converted(inner, value, name), name)
    if kind in (typing.Union, types.UnionType):
        return _one_of(hint, value, name)
    if kind is Literal:
        fits = any(isinstance(value, type(one)) and value == one for one in get_args(hint))
    elif kind in (Iterable, Sequence):
        return _items(hint, value, name)
    elif kind is int:
        with contextlib.suppress(TypeError):
            # True has an index too, but nobody who passes it means 1.
            if not isinstance(value, bool):
                return operator.index(value)
        fits = False
    elif kind is float:
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise _refused(name, value, _words(hint))
    return value


def _bounded(bounds: Sequence[Any], value: int, name: str) -> int:
    for bound in bounds:
        least = bound.gt + 1 if hasattr(bound, "gt") else bound.ge
        if value < least:
            raise _refused(name, value, f"at least {least}", is_close=True)
    return value


def _one_of(hint: Any, value: Any, name: str) -> Any:
    inside = None
    takes_paths = any(get_origin(option) is os.PathLike for option in get_args(hint))
    if takes_paths and not _can_name_a_file(value):
        raise _refused(name, value, "a path without characters that no file's name can have")
    for option in get_args(hint):
        try:
            return _converted(option, value, name)
        except _RefusedError as error:
            # The right kind of value, but out of bounds or with a wrong item.
            if error.is_close or error.name != name:
                inside = error
    raise inside or _refused(name, value, _words(hint))


def _can_name_a_file(value: Any) -> bool:
    """False for a path with a null or half a character; values that are no paths pass here."""
    try:
        return not isinstance(value, str | os.PathLike) or b"\0" not in os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        return False


def _items(hint: Any, value: Any, name: str) -> Any:
    """The converted items: a list for a `Sequence`, a generator for an `Iterable`."""
    expected = _words(hint)
    if isinstance(value, str | bytes):
        raise _refused(name, value, f"{expected}, not a bare text")
    unfit = isinstance(value, Mapping | Set) or (
        get_origin(hint) is Sequence and not isinstance(value, Sized)
    )
    try:
        items = None if unfit else iter(value)
    except TypeError:  # Also raised by an array of no dimension.
        items = None
    if items is None:
        raise _refused(name, value, expected)
    (inner,) = get_args(hint)
    # Long lists have plain items, which are passed on without further checks.
    checked = (
        item if type(item) is inner else _converted(inner, item, f"{name}[{at}]")
        for at, item in enumerate(items)
    )
    return list(checked) if get_origin(hint) is Sequence else checked


def _words(hint: Any) -> str:
    """What an annotation takes, in words."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return _words(inner[0])
    if kind is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in inner)
    if kind in (Iterable, Sequence):
        return f"a list of {_MANY.get(inner[0]) or inner[0].__name__}"
    name = kind.__name__
    return _WORDS.get(kind) or _WORDS.get(name) or f"a {name}"
