"""The description of one of Megatron-LM's arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Fate(Enum):
    """What an argument becomes here; the value is its name in the documentation."""

    BECOMES = "becomes a key"
    HOLDS = "nothing to set"
    LACKS = "no counterpart"


@dataclass(frozen=True)
class Argument:
    """One argument of Megatron-LM's `pretrain_bert.py`.

    Attributes:
        flags: Its names, the usual one first. A name that ends in `*` stands for a family.
        fate: What it becomes.
        note: What differs, why there is nothing to set, or why there is no counterpart; one
            sentence, or empty if the key says everything.
        keys: Keys that it sets.
        default: Megatron-LM's default if it is not given; None: nothing is set then.
        read: Makes the value of its only key from the argument's value; None if the translation
            needs other arguments too.
        values: For `HOLDS`, the values to which it applies; empty: all.
    """

    flags: tuple[str, ...]
    fate: Fate
    note: str
    keys: tuple[str, ...] = ()
    default: str | None = None
    read: Callable[[str], Any] | None = None
    values: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its usual name."""
        return self.flags[0]


def becomes(
    flags: str,
    keys: str,
    note: str = "",
    *,
    read: Callable[[str], Any] | None = None,
    default: str | None = None,
) -> Argument:
    """An argument that sets `keys`."""
    names = tuple(flags.split())
    return Argument(names, Fate.BECOMES, note, tuple(keys.split()), default=default, read=read)


def holds(flags: str, note: str, *, values: str = "") -> Argument:
    """An argument that needs no key here (only for these `values`, if any are given)."""
    return Argument(tuple(flags.split()), Fate.HOLDS, note, values=tuple(values.split()))


def lacks(flags: str, note: str) -> Argument:
    """An argument for something that is not available here, or not through an argument."""
    return Argument(tuple(flags.split()), Fate.LACKS, note)


def given(_: str) -> bool:
    """The value of a flag that is given without one."""
    return True
