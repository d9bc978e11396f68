"""Settings of the process, made once before a run: determinism and host memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_bert.config.schema import Config

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEPT_BYTES = 2**31 - 1
_GROWTH_BYTES = 2**28

_CPU_INFO = Path("/proc/cpuinfo")


def set_determinism(config: Config, device: torch.device) -> None:
    """Request bitwise reproducibility if `run.deterministic` holds (default: on the CPU).

    Call it before the first CUDA kernel, when cuBLAS reads its environment variables.
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
    """Let the process keep the memory that it frees, if the C library is glibc.

    By default blocks above 32 MiB go back to the kernel at once and come back as zeroed pages:
    on the CPU a training step then spends up to half of its time in page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _GROWTH_BYTES)


def precision_warnings(config: Config, cpu_info: Path = _CPU_INFO) -> Iterator[str]:
    """Warn if this machine's CPU would compute in BF16 without having instructions for it.

    PyTorch then converts to FP32 and back around every product. Only x86 lists its instructions; a
    processor that does not gets no warning.

    Args:
        config: the configuration.
        cpu_info: the file in which Linux describes the processor.
    """
    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    if config.precision.compute != "bf16" or config.run.device == "cuda" or not on_cpu:
        return
    lines = cpu_info.read_text(errors="replace").splitlines() if cpu_info.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    if flags is not None and not {"avx512_bf16", "amx_bf16"} & set(flags):
        yield (
            "warning     this machine's CPU has no BF16 instructions: precision.compute=bf16 takes "
            "several times as long on it as precision.compute=fp32"
        )
