"""Datasets made in parts (shards), which are named `S-00000-of-00004` and so on."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from megatron_bert.command_line.argument_checks import check_fields
from megatron_bert.command_line.arguments import argument
from megatron_bert.errors import DataError
from megatron_bert.words import counted, numbered

# No number of files needs more digits.
_NUMBER = "[0-9]{1,18}"


@dataclass(frozen=True)
class Shard:
    """One job's part of a dataset.

    Attributes:
        number: of this shard, from 0.
        count: number of all shards.
    """

    number: NonNegativeInt
    count: PositiveInt

    def __post_init__(self) -> None:
        check_fields(self)
        if self.number >= self.count:
            raise DataError(
                f"{argument('shard')} {self}: give K/N with K from 0 to N - 1, e.g. 0/8"
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `K/N`; raises `DataError` unless 0 <= K < N."""
        match = re.fullmatch(f"({_NUMBER})/({_NUMBER})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise DataError(
                f"{argument('shard')} {text}: give K/N with K from 0 to N - 1, e.g. 0/8"
            )
        return cls(int(match[1]), int(match[2]))

    def prefix(self, whole: Path) -> Path:
        """Prefix of the shard's dataset."""
        return whole.with_name(f"{whole.name}-{self.number:05}-of-{self.count:05}")

    def block(self, num_files: int) -> slice:
        """The contiguous block of files that is this shard's; needs at least one file a shard."""
        begin, end = (number * num_files // self.count for number in (self.number, self.number + 1))
        return slice(begin, end)


def check_given_once(inputs: Sequence[Path]) -> None:
    """Refuse an input that is given twice, also under another spelling of its path.

    Raises:
        DataError: an input is given twice; its documents would count twice.
    """
    places = [os.path.realpath(path) for path in inputs]
    times = Counter(places)
    twice = {str(path) for path, place in zip(inputs, places, strict=True) if times[place] > 1}
    if twice:
        raise DataError(
            f"{argument('inputs')} {', '.join(sorted(twice))}: given twice; give each once"
        )


_SHARD = re.compile(rf"(?P<set>.*)-(?P<number>{_NUMBER})-of-(?P<count>{_NUMBER})")
_MOST_NUMBERS = 8


def in_shard_order(prefixes: Sequence[Path]) -> list[Path]:
    """Sort the shards of each set by number, at the place of the first one given.

    Raises:
        DataError: a shard is missing or its number is not below the set's count, or something is
            given twice.
    """
    check_given_once(prefixes)
    sets: dict[tuple[str, str], dict[int, Path]] = {}
    for prefix in prefixes:
        shard = _SHARD.fullmatch(str(prefix))
        if shard is None:
            sets[str(prefix), "1"] = {0: prefix}
            continue
        number, count = int(shard["number"]), int(shard["count"])
        if number >= count:
            raise DataError(
                f"{argument('inputs')} {prefix}: shards are counted from 0, so none of {count} has "
                f"the number {number}; rename it"
            )
        shards = sets.setdefault((shard["set"], shard["count"]), {})
        if number in shards:
            raise DataError(
                f"{argument('inputs')} {shards[number]} and {prefix} are both shard {number}; "
                f"leave one of them out, or rename it"
            )
        shards[number] = prefix
    for (name, count_text), shards in sets.items():
        _check_complete(f"{name}-*-of-{count_text}", int(count_text), shards)
    return [shards[number] for shards in sets.values() for number in sorted(shards)]


def shard_set(prefix: Path) -> str | None:
    """Name of the set that a dataset is a shard of, by its name; None if it is not a shard's."""
    shard = _SHARD.fullmatch(str(prefix))
    return None if shard is None else f"{shard['set']}-*-of-{shard['count']}"


def _check_complete(name: str, count: int, numbers: Collection[int]) -> None:
    num_missing = count - len(numbers)
    if num_missing:
        # The count comes from a file name and may be huge, so never iterate that many times.
        missing = (number for number in range(count) if number not in numbers)
        some = numbered("shard", list(itertools.islice(missing, _MOST_NUMBERS)))
        more = f" and {num_missing - _MOST_NUMBERS:,} more" if num_missing > _MOST_NUMBERS else ""
        raise DataError(
            f"{argument('inputs')} {name}: {some}{more} of its {counted(count, 'shard')} "
            f"{'is' if num_missing == 1 else 'are'} not given (the first is shard 0); give "
            f"{'it' if num_missing == 1 else 'them'} too, or rename what is to be merged without "
            f"{'it' if num_missing == 1 else 'them'}"
        )
