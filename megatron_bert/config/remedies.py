"""Sizes near a refused one that work, for the messages that refuse it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def divisors(value: int) -> list[int]:
    """The divisors of `value` in order; beyond 2^32 only those that are found quickly."""
    largest_tried = min(math.isqrt(value), 2**16)  # a mistyped size must not hang the check
    small = [divisor for divisor in range(1, largest_tried + 1) if value % divisor == 0]
    return sorted({*small, *(value // divisor for divisor in small)})


def near_divisors(value: int, near: int) -> str:
    """The divisors of `value` nearest to `near`, at most three on each side, in words."""
    every = divisors(value)
    below = [divisor for divisor in every if divisor < near][-3:]
    above = [divisor for divisor in every if divisor > near][:3]
    return in_words([str(divisor) for divisor in below + above])


def near_multiples(value: int, factor: int) -> str:
    """The multiples of `factor` below and above `value`, in words."""
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def in_words(choices: Sequence[str]) -> str:
    """Choices in the form of a sentence: `a, b or c`."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last
