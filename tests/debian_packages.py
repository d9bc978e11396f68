"""Programs that tests need, installed where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

_INSTALL_SECONDS = 300


def need_programs(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install Debian's packages where the programs are missing; skip where that cannot be."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if not missing:
        return
    if os.geteuid() != 0:
        pytest.skip(f"{', '.join(missing)}: not installed, and installing takes root")
    if shutil.which("apt-get") is None:
        pytest.skip(f"{', '.join(missing)}: not installed, and there is no apt-get")
    result = subprocess.run(
        ["apt-get", "install", "-y", "--no-install-recommends", *packages],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        timeout=_INSTALL_SECONDS,
        check=False,
    )
    if result.returncode:
        pytest.skip(f"apt-get install {' '.join(packages)}: {result.stderr.strip()[-200:]}")
