"""What may change between the jobs of one run, and what makes it another run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_bert.config.change_table import ABSENT, Refusal, change_of
from megatron_bert.config.diagnostics import raise_problems
from megatron_bert.config.keys import all_keys, dotted, pattern
from megatron_bert.config.leaves import leaves
from megatron_bert.config.load import config_dict
from megatron_bert.config.schema import Config
from megatron_bert.config.stage_changes import curriculum_problems
from megatron_bert.config.yaml_text import KeyPath
from megatron_bert.files import StrPath


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names of the leaves in which two configurations differ, in the new one's order.

    Both are plain values, as `config_dict` returns them. A key that the old one lacks, because an
    earlier version wrote it, counts as its default.
    """
    return [dotted(path) for path, _, _ in _differences(old, new)]


def check_resume(
    old: Mapping[str, Any], new: Config, consumed_steps: int, new_run: bool, checkpoint: StrPath
) -> None:
    """Refuse to continue a run under a configuration that would make it a different run.

    Args:
        old: The configuration that the checkpoint was trained with, as plain values.
        new: The configuration of this job.
        consumed_steps: Optimizer steps that the checkpoint has done.
        new_run: Whether this job branches off into a new `run.dir` (`checkpoint.resume: PATH`).
        checkpoint: Its folder, for the remedy.

    Raises:
        ConfigError: All forbidden changes in one message, each with old value, new value, remedy.
    """
    problems: list[Refusal | str] = []
    tree = config_dict(new)
    for path, before, after in _differences(old, tree):
        change = change_of(pattern(path))
        if path[0] == "curriculum" or _means_the_same(path, before, after):
            continue
        if path == ("data", "tokenizer") and not consumed_steps:
            # Only a conversion creates a checkpoint before the first step.
            problems.append(
                f"data.tokenizer: the checkpoint was converted for {before}, this is {after}; "
                "convert it again for this one: tools/convert_checkpoint.py from-hf --tokenizer "
                f"{after}"
            )
        elif change.is_refused(new_run):
            problems.append(Refusal(dotted(path), before, after, change))
    problems += curriculum_problems(old, tree, consumed_steps, new_run)
    lines = [what if isinstance(what, str) else what.told(checkpoint) for what in problems]
    raise_problems(lines, "the configuration of a resumed run")


def _means_the_same(path: KeyPath, before: Any, after: Any) -> bool:
    if path == ("model", "vocab_size"):
        # Null stands for a size that only the tokenizer knows; the checkpoint's shapes decide.
        return before is None or after is None
    if path == ("data", "tokenizer"):
        return _same_content(before, after)
    if path[:2] == ("data", "train") and path[-1] == "prefix" and ABSENT not in (before, after):
        return os.path.normpath(str(before)) == os.path.normpath(str(after))
    if path[:2] == ("data", "train") and path[-1] == "weight":
        # The default is 1; if epochs have replaced the weight, they are compared themselves.
        return (before or 1.0) == (after or 1.0)
    return False


def _same_content(first: str, second: str) -> bool:
    """Whether two files hold the same bytes; False where one cannot be read."""
    # A checkpoint may come from anywhere, and reading a device that it names might never end.
    if not all(Path(name).is_file() for name in (first, second)):
        return False
    try:
        digests = {hashlib.sha256(Path(name).read_bytes()).digest() for name in (first, second)}
    except OSError:
        return False
    return len(digests) == 1


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Yield leaves that differ (path, old value, new value); those of `new` first, in its order."""
    before, after = dict(leaves(old)), dict(leaves(new))
    for path in dict.fromkeys([*after, *before]):
        first, second = _value_at(before, path), _value_at(after, path)
        # Ignore keys of another version that this one does not know.
        if first != second and pattern(path) in all_keys():
            yield path, first, second


def _value_at(values: Mapping[KeyPath, Any], path: KeyPath) -> Any:
    key = all_keys().get(pattern(path))
    if path in values or key is None or key.required:
        return values.get(path, ABSENT)
    return key.default
