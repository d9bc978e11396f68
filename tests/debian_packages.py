"""Programs that tests need, installed where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

# Where Debian puts daemons; not every PATH names it.
_DAEMONS = "/usr/sbin"
_INSTALL_SECONDS = 300.0
_UPDATE_SECONDS = 90.0
# Another test file's installation at the same time is waited for; a server that is silent is not.
_OPTIONS = ("-o", "DPkg::Lock::Timeout=200", "-o", "Acquire::http::Timeout=20")


def need_programs(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install Debian's packages where the programs are missing; skip where that cannot be.

    The reason says what is missing and what failed.
    """
    if _DAEMONS not in os.environ["PATH"].split(":"):
        os.environ["PATH"] += f":{_DAEMONS}"
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return
    if os.geteuid() != 0:
        pytest.skip(f"{', '.join(missing)}: not installed, and installing takes root")
    if shutil.which("apt-get") is None:
        pytest.skip(f"{', '.join(missing)}: not installed, and there is no apt-get")
    install = ("install", "-y", "--no-install-recommends", *packages)
    failures = [_failure_of(install, _INSTALL_SECONDS)]
    if failures[0] is not None:
        # The lists of packages may be missing, as in a fresh container, or name what has gone.
        failures = [
            _failure_of(("update",), _UPDATE_SECONDS),
            _failure_of(install, _INSTALL_SECONDS),
        ]
    if failures[-1] is not None:
        said = "; then ".join(filter(None, failures))
        pytest.skip(f"{', '.join(missing)}: not installed, and cannot be: {said}")


def _failure_of(command: Sequence[str], seconds: float) -> str | None:
    """Run apt-get; say what it ran and how that failed, None where it did not."""
    shown = f"apt-get {' '.join(command)}"
    try:
        result = subprocess.run(
            ["apt-get", *_OPTIONS, *command],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"`{shown}` did not end within {seconds:g} s"
    if result.returncode == 0:
        return None
    why = result.stderr.strip()[-200:] or "it said nothing"
    return f"`{shown}` ended with exit code {result.returncode}: {why}"
