"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("megatron-bert", "numpy", "sentencepiece", "tokenizers", "torch")


@dataclass(frozen=True)
class Hardware:
    """The machine.

    Attributes:
        processor: its model's name.
        cores: how many this process may use.
        memory_gb: in 10^9 bytes.
        load_average: runnable processes over the last minute, before the measurements; near 0 on a
            machine that does nothing else.
    """

    processor: str
    cores: int
    memory_gb: float
    load_average: float


def describe_hardware() -> Hardware:
    """Look at the machine."""
    return Hardware(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        load_average=round(os.getloadavg()[0], 2),
    )


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a figure depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    # Where the kernel names no model (ARM), the architecture.
    return platform.machine()
