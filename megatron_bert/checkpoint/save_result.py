"""The result of a save; importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SaveResult:
    """The result of a save.

    Attributes:
        step: The checkpoint's step.
        seconds: How long writing it took.
        blocked_seconds: How long training stood still for it: waiting for the save before it, plus
            the writing or, for a save in the background, the copy into the host's memory.
        size: Bytes of its tensors' files.
        error: Why it failed; `seconds`, `blocked_seconds` and `size` are 0 then. None if it did
            not.
    """

    step: int
    seconds: float = 0.0
    blocked_seconds: float = 0.0
    size: int = 0
    error: str | None = None
