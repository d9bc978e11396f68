"""What may change between the jobs of one run, and what makes it another run."""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_bert.config.diagnostics import format_value, raise_problems
from megatron_bert.config.keys import INDEX, all_keys, dotted, pattern
from megatron_bert.config.load import config_dict
from megatron_bert.config.schema import Config
from megatron_bert.config.yaml_text import KeyPath

ABSENT = "absent"
"""Stands for the value of a list entry that one of two configurations does not have."""


class Change(enum.Enum):
    """When a key may change. The values are the words of the guide's table."""

    FREE = "free"
    NEW_RUN = "in a new run"
    NEVER = "never"
    CURRICULUM = "see below"


# A whole section's class, or that of single keys in it.
_CLASSES: Mapping[str, Change | Mapping[str, Change]] = MappingProxyType(
    {
        "run": {"seed": Change.NEW_RUN, "": Change.FREE},
        "model": {
            # Only a name for values that are compared themselves.
            "preset": Change.FREE,
            "hidden_dropout": Change.NEW_RUN,
            "attention_dropout": Change.NEW_RUN,
            "init_std": Change.NEW_RUN,
            "": Change.NEVER,
        },
        "data.tokenizer": Change.NEVER,
        "data.train": Change.NEW_RUN,
        "data.valid": Change.FREE,
        "mlm": Change.NEW_RUN,
        "curriculum": Change.CURRICULUM,
        # The stages' rows, and with them every row's number, are steps x global_size.
        "batch": {"global_size": Change.NEVER, "": Change.FREE},
        "optimizer": {"max_skipped": Change.FREE, "": Change.NEW_RUN},
        "schedule": Change.NEW_RUN,
        "parallel": Change.FREE,
        "precision": Change.NEW_RUN,
        "recompute": Change.FREE,
        "checkpoint": Change.FREE,
        "eval": Change.FREE,
        "log": Change.FREE,
        "compile": Change.FREE,
        "distributed": Change.FREE,
    }
)


def change_of(name: str) -> Change:
    """When the key of this dotted name (`N` for list indices) may change.

    Raises:
        KeyError: The table has no such key.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        found = _CLASSES.get(".".join(parts[:length]))
        if isinstance(found, Change):
            return found
        if found is not None:
            return found.get(".".join(parts[length:]), found[""])
    raise KeyError(name)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names of the leaves in which two configurations differ, in the new one's order.

    Both are plain values, as `config_dict` returns; a key that the old one lacks, as it was
    written by an earlier version, counts as its default.
    """
    return [dotted(path) for path, _, _ in _differences(old, new)]


def check_resume(old: Mapping[str, Any], new: Config, consumed_steps: int, new_run: bool) -> None:
    """Refuse to continue a run under a configuration that would make it another one.

    Args:
        old: The configuration that the checkpoint was trained with, as plain values.
        new: The configuration of this job.
        consumed_steps: Optimizer steps behind the checkpoint.
        new_run: Whether this job branches off into a new `run.dir` (`checkpoint.resume: PATH`).

    Raises:
        ConfigError: All forbidden changes in one message, each with old value, new value, remedy.
    """
    problems = []
    for path, before, after in _differences(old, config_dict(new)):
        change = change_of(pattern(path))
        if change is Change.CURRICULUM or _means_the_same(path, before, after):
            continue
        if change is Change.NEVER or (change is Change.NEW_RUN and not new_run):
            problems.append(_refusal(dotted(path), before, after, change))
    before_stages = [(stage["seq_length"], stage["steps"]) for stage in old["curriculum"]]
    after_stages = [(stage.seq_length, stage.steps) for stage in new.curriculum]
    problems += _curriculum_problems(before_stages, after_stages, consumed_steps, new_run)
    raise_problems(problems, "the configuration of a resumed run")


def _curriculum_problems(
    old: Sequence[tuple[int, int]],
    new: Sequence[tuple[int, int]],
    consumed_steps: int,
    new_run: bool,
) -> Iterator[str]:
    """Compare stages, each (seq_length, steps): the past is fixed, the rest may grow."""
    begin = 0
    for index in range(max(len(old), len(new))):
        if index >= len(old):
            if not new_run:
                yield _refusal(f"curriculum.{index}", ABSENT, _stage(new[index]), Change.NEW_RUN)
            continue
        length, steps = old[index]
        done = min(max(consumed_steps - begin, 0), steps)
        # A stage is current up to the first step of the next one, so that a run that has just
        # reached a stage's end can still lengthen it.
        is_over = consumed_steps > begin + steps
        may_grow = begin <= consumed_steps <= begin + steps or index == len(old) - 1
        begin += steps
        if index >= len(new):
            change = Change.NEVER if done else Change.NEW_RUN
            if done or not new_run:
                yield _refusal(f"curriculum.{index}", _stage(old[index]), ABSENT, change)
            continue
        new_length, new_steps = new[index]
        if new_length != length and (done or not new_run):
            change = Change.NEVER if done else Change.NEW_RUN
            yield _refusal(f"curriculum.{index}.seq_length", length, new_length, change)
        key = f"curriculum.{index}.steps"
        if new_steps == steps:
            continue
        if is_over:
            yield _refusal(key, steps, new_steps, Change.NEVER)
        elif new_steps < done:
            yield (
                f"{key}: was {steps}, is {new_steps}, but {done} steps of this stage are done; "
                f"use at least {done}"
            )
        elif not new_run and not (new_steps > steps and may_grow):
            yield _refusal(key, steps, new_steps, Change.NEW_RUN)


def _stage(stage: tuple[int, int]) -> dict[str, int]:
    return {"seq_length": stage[0], "steps": stage[1]}


def _refusal(key: str, before: Any, after: Any, change: Change) -> str:
    remedy = {
        Change.NEW_RUN: (
            "may change only in a new run: set checkpoint.resume to the checkpoint's path and "
            "run.dir to a new directory, or restore the old value"
        ),
        Change.NEVER: (
            "cannot change once training has begun: restore the old value, or start anew with "
            "checkpoint.resume=none and a new run.dir"
        ),
    }[change]
    return f"{key}: was {format_value(before)}, is {format_value(after)}; {remedy}"


def _means_the_same(path: KeyPath, before: Any, after: Any) -> bool:
    if path == ("model", "vocab_size"):
        # Null stands for a size that only the tokenizer knows; the checkpoint's shapes decide.
        return before is None or after is None
    if path == ("data", "tokenizer"):
        return _same_content(before, after)
    if path[:2] == ("data", "train") and path[-1] == "prefix" and ABSENT not in (before, after):
        return os.path.normpath(str(before)) == os.path.normpath(str(after))
    return False


def _same_content(first: str, second: str) -> bool:
    """Whether two files hold the same bytes; False where one cannot be read."""
    try:
        digests = {hashlib.sha256(Path(name).read_bytes()).digest() for name in (first, second)}
    except OSError:
        return False
    return len(digests) == 1


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Leaves that differ: path, old value, new value; those of `new` first, in its order."""
    before, after = dict(_leaves(old, ())), dict(_leaves(new, ()))
    for path in dict.fromkeys([*after, *before]):
        first, second = _value_at(before, path), _value_at(after, path)
        # A key of another version that this one does not know has nothing to say to it.
        if first != second and pattern(path) in all_keys():
            yield path, first, second


def _value_at(leaves: Mapping[KeyPath, Any], path: KeyPath) -> Any:
    key = all_keys().get(pattern(path))
    if path in leaves or key is None or INDEX in key.name.split("."):
        return leaves.get(path, ABSENT)
    return key.default


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _leaves(entry, (*path, name))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _leaves(entry, (*path, index))
    else:
        yield path, value
