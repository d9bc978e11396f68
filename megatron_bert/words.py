"""Amounts in words, as people write them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things: 1 layer, 1,024 rows, 2 micro-batches (whose plural has to be given)."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Things by their numbers, at least one of them: rank 3, ranks 3, 4."""
    return f"{noun if len(numbers) == 1 else noun + 's'} {', '.join(map(str, numbers))}"


def rounded(count: int) -> str:
    """A number as people say it: 6.4 M, 187.3 B; one of less than a million as it is."""
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def times(count: float) -> str:
    """How many times, to four digits, or as a whole number from 100 on: 1 time, 0.4213 times."""
    text = f"{count:,.0f}" if count >= 100 else f"{count:.4g}"
    return f"{text} time" if text == "1" else f"{text} times"


def share(count: int, total: int, unit: str) -> str:
    """Write a part of a whole: `3 of 8 tokens (37.50%)`; nothing of nothing is 0 %."""
    return f"{count:,} of {total:,} {unit} ({count / max(1, total):.2%})"


def format_duration(seconds: float) -> str:
    """Write a duration as people say it: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = int(seconds // 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
