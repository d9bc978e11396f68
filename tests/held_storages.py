"""What is still there of what operators made: the memory that a forward pass keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Storages(TorchDispatchMode):
    """The storages that operators have made, beside those that were there."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self._there = {tensor.untyped_storage()._cdata for tensor in there}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._there:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def held(self) -> int:
        """Bytes of those that are still there."""
        gc.collect()  # Triton's interpreter leaves what it was called with last in a cycle
        return sum(size for reference, size in self._made.values() if not reference.expired())
