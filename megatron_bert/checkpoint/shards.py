"""What one rank holds of a training state, as it stands or as a copy in the host's memory."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.planner import SavePlan

from megatron_bert.distributed.device_work import DevicePoint
from megatron_bert.errors import CheckpointError
from megatron_bert.parallel.sharding import local_part

_ALIGNMENT = 64  # bytes; every type may begin there, and so may a cache line
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context


@dataclass(frozen=True)
class LocalShards:
    """A rank's pieces of whole tensors.

    Attributes:
        plan: Where each piece lies in its whole tensor, and how large that is.
        pieces: The rank's part of each tensor in `plan`, by name, on any device.
    """

    plan: SavePlan
    pieces: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> LocalShards:
        """Take this rank's shard of each DTensor; a plain tensor is one piece."""
        plan = create_default_local_save_plan(dict(tensors), is_coordinator=False)
        names = [item.index.fqn for item in plan.items]
        return cls(plan, {name: local_part(tensors[name]).detach() for name in names})

    def whole_bytes(self) -> dict[str, int]:
        """The bytes that each whole tensor takes."""
        sizes: dict[str, int] = {}
        for item in self.plan.items:
            name = item.index.fqn
            assert item.tensor_data is not None
            sizes[name] = math.prod(item.tensor_data.size) * self.pieces[name].itemsize
        return sizes


class HostCopy:
    """Reusable host memory for one copy of a rank's shards.

    It is allocated for the first copy and kept: fresh memory would cost more time than the copy
    itself. For CUDA it is pinned, so that the host goes on while the device copies.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._copied: DevicePoint | None = None

    def reserve(self, shards: LocalShards) -> None:
        """Ensure that there is memory for a copy of `shards`; the previous copy is lost.

        Raises:
            CheckpointError: The memory cannot be pinned.
        """
        pieces = shards.pieces.values()
        size = sum(map(_room, pieces))
        if self._memory is None or len(self._memory) != size:
            self._memory = None  # freed first, so that the two never exist together
            memory = torch.empty(size, dtype=torch.uint8)
            if any(piece.is_cuda for piece in pieces):
                _pin(memory)
            self._memory = memory

    def take(self, shards: LocalShards) -> LocalShards:
        """Copy `shards`, for which memory was reserved.

        Changes that are made to the originals after this call do not reach the copy. On CUDA it
        is complete only after `wait`.
        """
        assert self._memory is not None
        pieces = shards.pieces
        devices = [piece.device for piece in pieces.values() if piece.is_cuda]
        ends = list(accumulate(_room(piece) for piece in pieces.values()))
        copies: dict[str, torch.Tensor] = {}
        for (name, piece), end in zip(pieces.items(), ends, strict=True):
            begin = end - _room(piece)
            room = self._memory[begin : begin + piece.numel() * piece.itemsize]
            copies[name] = room.view(piece.dtype).view(piece.shape)
            # On the stream that also updates the weights, so they change only after the copy.
            copies[name].copy_(piece, non_blocking=True)
        self._copied = DevicePoint(devices[0]) if devices else None
        return LocalShards(shards.plan, copies)

    def wait(self, given_up: threading.Event) -> None:
        """Wait, in any thread, until the last copy is complete, or nobody needs it any more."""
        if self._copied is not None:
            self._copied.wait(given_up=given_up)


def _room(piece: torch.Tensor) -> int:
    return math.ceil(piece.numel() * piece.itemsize / _ALIGNMENT) * _ALIGNMENT


def _pin(memory: torch.Tensor) -> None:
    """Pin memory where it is: what PyTorch allocates pinned is rounded up to a power of two."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.data_ptr()
    try:
        torch.cuda.check_error(int(cudart.cudaHostRegister(address, len(memory), _PORTABLE)))
    except RuntimeError as error:
        # CUDA would report this call's error again at the next launch, whoever makes it.
        with suppress(RuntimeError):
            torch.zeros((), device="cuda").add_(1.0)
        raise CheckpointError(
            f"cannot pin {len(memory)} bytes of host memory ({error}); leave more memory free, or "
            "set checkpoint.async=false"
        ) from error
    weakref.finalize(memory, cudart.cudaHostUnregister, address)
