"""What is known of one of Megatron-LM's arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Fate(Enum):
    """What becomes of an argument here; the value is its name in the documentation."""

    BECOMES = "becomes a key"
    HOLDS = "nothing to set"
    LACKS = "no counterpart"


@dataclass(frozen=True)
class Argument:
    """One argument of Megatron-LM's `pretrain_bert.py`.

    Attributes:
        flags: Its names, the usual one first. A name that ends in `*` stands for a family.
        fate: What becomes of it.
        note: What differs, why there is nothing to set, or why there is no counterpart; one
            sentence, or empty where the key says all.
        keys: Keys that it sets.
        default: What Megatron-LM takes where it is not given; None: nothing is then set.
        read: Makes the value of its only key out of the argument's value; None where
            `translation` needs other arguments too.
        values: Of `HOLDS`: the values that this is true of; empty: all.
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
        """The usual one of its names."""
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
    """An argument whose wish is met without a key (with these `values`, if not with all)."""
    return Argument(tuple(flags.split()), Fate.HOLDS, note, values=tuple(values.split()))


def lacks(flags: str, note: str) -> Argument:
    """An argument that asks for something that is not to be had, or not by an argument."""
    return Argument(tuple(flags.split()), Fate.LACKS, note)


def given(_: str) -> bool:
    """The value of a flag that is given without one."""
    return True
