"""Triton compiles every kernel for GPUs that are not here, and they fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton (tests/run.sh --peers installs it)")

pytestmark = pytest.mark.peers

# Of a multiprocessor: bytes that one program may share, by compute capability.
SHARED_BYTES = {
    cc: kib * 1024 for cc, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227))
}
REGISTERS = 65536
# Bytes of a thread that tiles were quickest with which are a few registers short.
SPILLED = {"flash_": 128, "fp8_gated_activation_gradient": 64}
CHECKOUT = Path(__file__).resolve().parents[2]


def test_every_kernel_compiles_and_fits_on_the_gpus_that_it_is_for() -> None:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").exists():
        pytest.skip(f"Triton {triton.__version__} comes without NVIDIA's tools")
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.compiled_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    kernels = {name.split()[0] for _, name, _ in found}
    assert len(kernels) == 17
    for capability, name, figures in found:
        if isinstance(figures, str):
            # The releases beside the oldest and the newest PyTorch that are supported.
            assert triton.__version__.split(".")[:2] not in (["3", "6"], ["3", "9"]), figures
            pytest.skip(figures)
        about = f"{name} for compute capability {capability}: {figures}"
        assert figures["shared"] <= SHARED_BYTES[capability], about
        # Shared out in eights.
        registers = (figures["registers"] + 7) // 8 * 8
        assert registers * 32 * figures["warps"] <= REGISTERS, about
        most = max((most for start, most in SPILLED.items() if name.startswith(start)), default=0)
        if capability == 90:
            assert figures["spilled"] <= most, about
        if name.startswith(("fused", "fp8")) and not name.endswith(("wide", "fp32")):
            # Several programs a multiprocessor: while one computes others load.
            assert 2 * registers * 32 * figures["warps"] <= REGISTERS, about
            assert figures["spilled"] <= most, about
