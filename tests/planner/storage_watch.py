"""The most bytes that tensors hold at once, counted storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageWatch(TorchDispatchMode):
    """Counts the storages of all tensors that operators return, until nothing refers to them.

    PyTorch's own `MemTracker` works alike, but takes no module that is called several times a step,
    as those of a step of several micro-batches are.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        """Begin with the tensors that are there before the first operator."""
        super().__init__()
        self.peak = 0
        self._bytes: dict[int, int] = {}
        self._sum = 0
        for tensor in held:
            self._note(tensor)

    def __enter__(self) -> Any:
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._count(storage)
            return result

        # How gathered weights are freed and taken back.
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.device.type == "cpu":
            self._count(local.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._bytes:
            weakref.finalize(storage, self._forget, key)
        self._sum += size - self._bytes.get(key, 0)
        self._bytes[key] = size
        self.peak = max(self.peak, self._sum)

    def _forget(self, key: int) -> None:
        self._sum -= self._bytes.pop(key, 0)
