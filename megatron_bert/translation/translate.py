"""Translates Megatron-LM's arguments into a configuration, and lists what has no key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_bert.config.checks import value_problems
from megatron_bert.config.diagnostics import explain, raise_problems
from megatron_bert.config.schema import Config
from megatron_bert.errors import ConfigError
from megatron_bert.translation.argument import Fate
from megatron_bert.translation.compound_keys import Builder, set_compound_keys
from megatron_bert.translation.given import Given
from megatron_bert.translation.table import ARGUMENTS, find, nearest

_REQUIRED = (
    "--num-layers",
    "--hidden-size",
    "--num-attention-heads",
    "--max-position-embeddings",
    "--seq-length",
    "--micro-batch-size",
    "--global-batch-size",
    "--lr",
)
_KEY = re.compile(r"[a-z_]+(?:\.\w+)+")


@dataclass(frozen=True)
class Translation:
    """A configuration made from Megatron-LM's arguments.

    Attributes:
        tree: The keys that are set, by section; it loads and has no contradictions.
        by_hand: What the user has to fill in, a sentence each.
        differs: What is done differently from Megatron-LM, a sentence each.
        lacks: Arguments without a counterpart, with the reason.
        holds: Arguments that need no key here, with the reason.
        unknown: Flags that are not in the table, with the nearest one that is.
    """

    tree: dict[str, Any]
    by_hand: tuple[str, ...]
    differs: tuple[str, ...]
    lacks: tuple[str, ...]
    holds: tuple[str, ...]
    unknown: tuple[str, ...]


def translate(words: Sequence[str]) -> Translation:
    """Translate the arguments of Megatron-LM's `pretrain_bert.py`.

    Megatron-LM's defaults for arguments that were not given are written out if they differ from
    this project's.

    Raises:
        ConfigError: An argument that a configuration requires is missing, a value is of the wrong
            kind, or the configuration would contradict itself; with the remedy.
    """
    given = Given(words)
    _check_required(given)
    builder = Builder(given)
    _set_simple_keys(builder)
    set_compound_keys(builder)
    _check(builder)
    lacks, holds, unknown = _without_keys(given)
    if given.stray:
        unknown.append(f"{' '.join(given.stray)}: stands behind no argument")
    return Translation(
        tree=builder.tree,
        by_hand=tuple(builder.by_hand),
        differs=tuple(builder.differs),
        lacks=tuple(lacks),
        holds=tuple(holds),
        unknown=tuple(unknown),
    )


def _check_required(given: Given) -> None:
    missing = [flag for flag in _REQUIRED if not given.has(flag)]
    if not given.has("--train-iters") and not given.has("--train-samples"):
        missing.append("--train-iters")
    if missing:
        meant = [flag for flag in given.values if not find(flag) and nearest(flag) in missing]
        slips = "".join(f"; is {flag} meant to be {nearest(flag)}?" for flag in meant)
        raise ConfigError(
            f"arguments {', '.join(missing)}: not given, and a configuration needs them; add what "
            f"the run had{slips}"
        )


def _set_simple_keys(builder: Builder) -> None:
    for entry in ARGUMENTS:
        if entry.read is None or not entry.keys:
            continue
        if builder.given.has(entry.name) or entry.default is not None:
            builder.set(entry.keys[0], builder.given.read(entry.name, entry.read))


def _without_keys(given: Given) -> tuple[list[str], list[str], list[str]]:
    lacks: list[str] = []
    holds: list[str] = []
    unknown: list[str] = []
    for flag, values in given.values.items():
        entry = find(flag)
        shown = " ".join([flag, *values])
        if entry is None:
            like = nearest(flag)
            unknown.append(f"{shown}: unknown{f'; is it {like}?' if like else ''}")
        elif entry.fate is Fate.LACKS:
            lacks.append(f"{shown}: {entry.note}")
        elif entry.fate is Fate.HOLDS:
            is_met = not entry.values or " ".join(values) in entry.values
            (holds if is_met else lacks).append(f"{shown}: {entry.note}")
    return lacks, holds, unknown


def _check(builder: Builder) -> None:
    problems: list[str] = []
    try:
        problems += value_problems(Config.model_validate(builder.tree))
    except ValidationError as error:
        problems += explain(error, {})
    named = [_with_flags(problem, builder.given) for problem in problems]
    raise_problems(named, "what these arguments become")


def _with_flags(problem: str, given: Given) -> str:
    """A problem with keys; the arguments that set them, which the user wrote, are named too."""

    def name(found: re.Match[str]) -> str:
        key = found[0]
        keys = {key, re.sub(r"\d+", "N", key)}
        flags = [
            entry.name for entry in ARGUMENTS if keys & {*entry.keys} and given.has(entry.name)
        ]
        return f"{key} ({', '.join(flags)})" if flags else key

    return _KEY.sub(name, problem)
