"""Datasets made in parts, which are named `S-00000-of-00004` and so on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_bert.config.errors import DataError

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
