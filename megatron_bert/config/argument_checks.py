"""Arguments from Python, checked by their annotations: a command line has its parser for that."""

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

from megatron_bert.config.arguments import argument
from megatron_bert.config.errors import UserError
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
    # How to come by one, where the name alone does not say it.
    "Config": "a Config, which load_config and build_config return",
    "PreprocessOptions": "PreprocessOptions(...)",
    "RunRecords": "RunRecords, which train and RunRecords.read return",
    "Shard": "a Shard, e.g. megatron_bert.data.shards.Shard(0, 8), the first of eight",
}
_MANY = {int: "whole numbers", str: "texts", StrPath: "paths"}


def checked(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Refuse arguments that are not what a function's annotations say, before it runs.

    What counts as a whole number elsewhere (of numpy, a tensor of one) is passed on as an int, also
    within a list. Bounds are pydantic's (`PositiveInt`). Where an `Iterable` is taken its items
    are looked at as they come.

    Raises:
        UserError: by the function made of it, which names the argument, its value and what to give.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        # Not what is returned, which may be known to a type checker alone.
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
    """Do the same for the fields of a dataclass, frozen or not.

    Raises:
        UserError: a field's value is not what its annotation says.
    """
    hints = typing.get_type_hints(type(record), include_extras=True)
    for field in dataclasses.fields(record):
        value = _converted(hints[field.name], getattr(record, field.name), argument(field.name))
        object.__setattr__(record, field.name, value)


class _RefusedError(UserError):
    """What is given as `name` is not what the annotation takes; close: it is of the right type."""

    def __init__(self, message: str, name: str, is_close: bool) -> None:
        super().__init__(message)
        self.name, self.is_close = name, is_close


def _refused(name: str, value: object, expected: str, *, is_close: bool = False) -> _RefusedError:
    shown = repr(value)
    if len(shown) > _LONGEST_VALUE:
        shown = f"{shown[: _LONGEST_VALUE - 3]}..."
    return _RefusedError(f"{name} = {shown}: give {expected}", name, is_close)


def _converted(hint: Any, value: Any, name: str) -> Any:
    """The value as the annotation has it."""
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
            # True has an index too, but nobody means 1 by it.
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
            # Of the right kind, but for its bounds or for an item.
            if error.is_close or error.name != name:
                inside = error
    raise inside or _refused(name, value, _words(hint))


def _can_name_a_file(value: Any) -> bool:
    """False for a path with a null or half a character; what is no path is looked at elsewhere."""
    try:
        return not isinstance(value, str | os.PathLike) or b"\0" not in os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        return False


def _items(hint: Any, value: Any, name: str) -> Any:
    """Of a `Sequence` a list, of an `Iterable` a generator, of the items as they should be."""
    expected = _words(hint)
    if isinstance(value, str | bytes):
        raise _refused(name, value, f"{expected}, not a bare text")
    unfit = isinstance(value, Mapping | Set) or (
        get_origin(hint) is Sequence and not isinstance(value, Sized)
    )
    try:
        items = None if unfit else iter(value)
    except TypeError:  # An array of no dimension, too.
        items = None
    if items is None:
        raise _refused(name, value, expected)
    (inner,) = get_args(hint)
    # Long lists are of plain items: those are passed on without more ado.
    checked = (
        item if type(item) is inner else _converted(inner, item, f"{name}[{at}]")
        for at, item in enumerate(items)
    )
    return list(checked) if get_origin(hint) is Sequence else checked


def _words(hint: Any) -> str:
    """What an annotation takes."""
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
