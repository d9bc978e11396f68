"""What is to be closed at the end, used in a `with` statement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closeable(ABC):
    """A context manager that is itself what is entered, and whose end is `close`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held, however the block ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
