"""Datasets made in parts, which are named `S-00000-of-00004` and so on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bert.config.errors import DataError


@dataclass(frozen=True)
class Shard:
    """One job's part of a dataset.

    Attributes:
        number: from 0.
        count: of all shards.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `K/N`; raises `DataError` unless 0 <= K < N."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise DataError(f"--shard {text}: give K/N with K from 0 to N - 1, e.g. 0/8")
        return cls(int(match[1]), int(match[2]))

    def prefix(self, whole: Path) -> Path:
        """Name of the shard's dataset."""
        return whole.with_name(f"{whole.name}-{self.number:05}-of-{self.count:05}")


_SHARD = re.compile(r"(?P<set>.*)-(?P<number>\d+)-of-(?P<count>\d+)")


def in_shard_order(prefixes: Sequence[Path]) -> list[Path]:
    """Sort the shards of each set by number, to where the first of them stands.

    Raises:
        DataError: a shard is missing, or something is given twice.
    """
    twice = sorted({str(prefix) for prefix in prefixes if prefixes.count(prefix) > 1})
    if twice:
        raise DataError(f"--input {', '.join(twice)}: given twice; give each dataset once")
    groups: dict[str, dict[int, Path]] = {}
    for prefix in prefixes:
        shard = _SHARD.fullmatch(str(prefix))
        name = f"{shard['set']}-*-of-{shard['count']}" if shard else str(prefix)
        groups.setdefault(name, {})[int(shard["number"]) if shard else 0] = prefix
    for name, group in groups.items():
        shard = _SHARD.fullmatch(str(next(iter(group.values()))))
        missing = sorted(set(range(int(shard["count"]))) - set(group)) if shard else []
        if missing:
            raise DataError(
                f"--input {name}: shards {', '.join(map(str, missing))} (counted from 0) are "
                f"missing; give them too, or rename what is to be merged without them"
            )
    return [group[number] for group in groups.values() for number in sorted(group)]
