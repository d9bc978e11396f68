"""The hardware and software that a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_bert.host import usable_cores

_PACKAGES = ("megatron-bert", "numpy", "sentencepiece", "tokenizers", "torch")
# Listed if they are installed.
_OPTIONAL = ("apex", "flash-attn", "flash-attn-3", "transformer-engine", "triton")


@dataclass(frozen=True)
class Hardware:
    """The machine.

    Attributes:
        processor: its model's name.
        cores: number of cores that this process may use.
        memory_gb: in 10^9 bytes.
        load_average: runnable processes over the last minute, before the measurements; near 0 on
            an otherwise idle machine.
    """

    processor: str
    cores: int
    memory_gb: float
    load_average: float


def describe_hardware() -> Hardware:
    """Look at the machine."""
    return Hardware(
        processor=_processor(),
        cores=usable_cores(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        load_average=round(os.getloadavg()[0], 2),
    )


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a figure depends on, and this code's commit.

    Also `cuda`, the version that PyTorch was built for, if any. A `+` marks a checkout that differs
    from its commit; without git there is no commit.
    """
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    for name in _OPTIONAL:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    cuda = import_module("torch.version").cuda
    if cuda is not None:
        versions["cuda"] = cuda
    commit = _commit()
    return versions if commit is None else {**versions, "commit": commit}


def _commit() -> str | None:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        commit = _output_of(*git, "rev-parse", "--short=10", "HEAD")
        changed = _output_of(*git, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


def _output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    # If the kernel names no model (ARM), use the architecture.
    return platform.machine()
