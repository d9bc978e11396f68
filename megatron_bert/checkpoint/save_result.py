"""What a save tells of itself; read without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SaveResult:
    """What became of a save.

    Attributes:
        step: Of the checkpoint.
        seconds: What writing it took.
        blocked_seconds: How long training stood still for it: a wait for the save before it, and
            the writing, or on its way to the background the copy into the host's memory.
        size: Bytes of its tensors' files.
        error: Why it failed, and the numbers above are 0; None where it did not.
    """

    step: int
    seconds: float = 0.0
    blocked_seconds: float = 0.0
    size: int = 0
    error: str | None = None
