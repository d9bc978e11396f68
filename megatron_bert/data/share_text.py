"""How the tools write what part of a whole something is."""

from __future__ import annotations


def share(count: int, total: int, unit: str) -> str:
    """Write a part of a whole: `3 of 8 tokens (37.50%)`; nothing of nothing is 0 %."""
    return f"{count:,} of {total:,} {unit} ({count / max(1, total):.2%})"
