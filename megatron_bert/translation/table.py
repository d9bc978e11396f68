"""The whole table of arguments, and how to find one in it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

from megatron_bert.translation.argument import Argument
from megatron_bert.translation.machine_table import MACHINE
from megatron_bert.translation.model_table import DATA, MODEL
from megatron_bert.translation.training_table import OUTPUT, TRAINING

PARTS: Mapping[str, tuple[Argument, ...]] = MappingProxyType(
    {
        "Model": MODEL,
        "Data": DATA,
        "Training": TRAINING,
        "What is written, and when a job ends": OUTPUT,
        "Machine": MACHINE,
    }
)

ARGUMENTS: tuple[Argument, ...] = tuple(entry for part in PARTS.values() for entry in part)

_EXACT: Mapping[str, Argument] = MappingProxyType(
    {flag: entry for entry in ARGUMENTS for flag in entry.flags if "*" not in flag}
)
# A longer pattern is more specific than a shorter one.
_FAMILIES = sorted(
    ((flag, entry) for entry in ARGUMENTS for flag in entry.flags if "*" in flag),
    key=lambda family: -len(family[0]),
)


def find(flag: str) -> Argument | None:
    """The argument with this name, else the family that the name belongs to."""
    if flag in _EXACT:
        return _EXACT[flag]
    return next((entry for family, entry in _FAMILIES if fnmatchcase(flag, family)), None)


def nearest(flag: str) -> str | None:
    """The name that an unknown one is most likely a misspelling of; None if there is none."""
    return next(iter(difflib.get_close_matches(flag, _EXACT, n=1, cutoff=0.8)), None)
