"""When each key may change between the jobs of one run, and how a change is refused."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_bert.config.diagnostics import format_value
from megatron_bert.files import StrPath

ABSENT = "absent"
"""Placeholder for the value of a list entry that only one of two configurations has."""


class Change(enum.Enum):
    """When a key may change. The values are the words of the guide's table."""

    FREE = "free"
    NEW_RUN = "in a new run"
    NEVER = "never"
    CURRICULUM = "see above"

    def is_refused(self, new_run: bool) -> bool:
        """Whether the class alone forbids a change; `new_run`: the job branches off a new run."""
        return self is Change.NEVER or (self is Change.NEW_RUN and not new_run)


# The class of a whole section, or of single keys in it ("" stands for the section's other keys).
_CLASSES: Mapping[str, Change | Mapping[str, Change]] = MappingProxyType(
    {
        "run": {"seed": Change.NEW_RUN, "": Change.FREE},
        "model": {
            # Only a name for values that are themselves compared.
            "preset": Change.FREE,
            "hidden_dropout": Change.NEW_RUN,
            "attention_dropout": Change.NEW_RUN,
            "init_std": Change.NEW_RUN,
            "": Change.NEVER,
        },
        "data.tokenizer": Change.NEVER,
        "data.train": Change.NEW_RUN,
        "data.valid": Change.FREE,
        "data.held_out_fraction": Change.NEW_RUN,
        "data.threads": Change.FREE,
        "mlm": Change.NEW_RUN,
        "curriculum": {
            "N.mlm.probability": Change.NEW_RUN,
            "N.lr_factor": Change.NEW_RUN,
            "": Change.CURRICULUM,
        },
        # A stage's rows, and with them every later row's number, are steps x global_size.
        "batch": {"global_size": Change.CURRICULUM, "": Change.FREE},
        "optimizer": {"max_skipped": Change.FREE, "": Change.NEW_RUN},
        "schedule": Change.NEW_RUN,
        "parallel": Change.FREE,
        "precision": Change.NEW_RUN,
        "recompute": Change.FREE,
        "kernels": Change.FREE,
        "checkpoint": Change.FREE,
        "eval": Change.FREE,
        "log": Change.FREE,
        "profile": Change.FREE,
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


@dataclass(frozen=True)
class Refusal:
    """A change that is not allowed.

    Attributes:
        key: dotted name of the key that changed.
        before: its value in the checkpoint.
        after: its value in this job.
        change: why it is refused; not `FREE`.
    """

    key: str
    before: Any
    after: Any
    change: Change

    def told(self, checkpoint: StrPath) -> str:
        """A line with the key, both values, and the remedy.

        Args:
            checkpoint: the checkpoint that the job would continue from.
        """
        if self.change is Change.NEW_RUN:
            place = shlex.quote(str(checkpoint))
            remedy = (
                f"may change only in a new run: set checkpoint.resume={place} and run.dir to "
                "a new directory, or restore the old value"
            )
        else:
            remedy = (
                "cannot change once training has begun: restore the old value, or start anew with "
                "checkpoint.resume=none and a new run.dir"
            )
        before, after = format_value(self.before), format_value(self.after)
        return f"{self.key}: was {before}, is {after}; {remedy}"
