"""Settings of the process, made once before a run: determinism and host memory."""

from __future__ import annotations

import ctypes
import os

import torch

from megatron_bert.config.schema import Config

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEPT_BYTES = 2**31 - 1
_GROWTH_BYTES = 2**28


def set_determinism(config: Config, device: torch.device) -> None:
    """Ask for the same bits every time where `run.deterministic` holds (default: on the CPU).

    To be called before the first CUDA kernel: cuBLAS reads its environment then.
    """
    deterministic = config.run.deterministic
    if deterministic is None:
        deterministic = device.type == "cpu"
    if deterministic and device.type == "cuda":
        # Without a workspace of its own cuBLAS is not deterministic, and PyTorch refuses to use it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Filling new tensors would cost a pass over each; nothing here reads what it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let the process keep what it frees, where the C library is glibc.

    By default blocks above 32 MiB go back to the kernel at once and come back as zeroed pages:
    on the CPU a training step then spends up to half of its time in page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _GROWTH_BYTES)
