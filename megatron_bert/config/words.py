"""Numbers with their nouns, as people write them."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things: 1 layer, 1,024 rows, 2 micro-batches (whose plural has to be given)."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def times(count: float) -> str:
    """How many times, to four digits, or to a whole number of many: 1 time, 0.4213 times."""
    text = f"{count:,.0f}" if count >= 100 else f"{count:.4g}"
    return f"{text} time" if text == "1" else f"{text} times"
