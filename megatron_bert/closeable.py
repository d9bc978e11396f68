"""The base of objects that are used in a `with` statement and closed at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closeable(ABC):
    """A context manager that yields itself and ends with `close`."""

    @abstractmethod
    def close(self) -> None:
        """Release what is held, however the block ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
