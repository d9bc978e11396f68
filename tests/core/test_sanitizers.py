from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "sanitizers.sh"
NOT_POSSIBLE_HERE = 77


@pytest.mark.slow
def test_the_data_core_is_clean_under_the_sanitizers_and_fuzzing(tmp_path: Path) -> None:
    # CMake may be the environment's, which need not be active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "build")],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=570,
    )
    if done.returncode == NOT_POSSIBLE_HERE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\d+ tests, 0 failed$", done.stdout, re.MULTILINE)) == 2
