from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_bert.training.runtime import precision_warnings, set_determinism
from tests.small_model import small_config


@pytest.fixture(autouse=True)
def _settings_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "unset below")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        (None, "cpu", True),
        (None, "cuda", False),
        (False, "cpu", False),
        (True, "cuda", True),
    ],
)
def test_determinism_is_asked_for_by_the_key_or_the_device(
    asked: bool | None, device: str, expected: bool
) -> None:
    set_determinism(small_config(run={"deterministic": asked}), torch.device(device))
    assert torch.are_deterministic_algorithms_enabled() is expected


def test_cublas_gets_the_workspace_without_which_it_refuses_to_be_deterministic() -> None:
    set_determinism(small_config(run={"deterministic": True}), torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_cublas_workspace_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_determinism(small_config(run={"deterministic": True}), torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    ("cpu", "compute", "device", "warned"),
    [
        ("flags : fpu avx2 avx512f", "bf16", "cpu", True),
        ("flags : fpu avx2 avx512f", "bf16", "auto", not torch.cuda.is_available()),
        ("flags : fpu avx2 avx512f", "bf16", "cuda", False),
        ("flags : fpu avx2 avx512f", "fp32", "cpu", False),
        ("flags : fpu avx512f avx512_bf16", "bf16", "cpu", False),
        ("flags : fpu amx_bf16", "bf16", "cpu", False),
        ("Features : fp asimd", "bf16", "cpu", False),
    ],
)
def test_bf16_on_a_cpu_without_instructions_for_it_is_warned_of(
    tmp_path: Path, cpu: str, compute: str, device: str, warned: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{cpu}\n")
    config = small_config(precision={"compute": compute}, run={"device": device})
    warnings = list(precision_warnings(config, tmp_path / "cpuinfo"))
    assert len(warnings) == warned
    assert all("precision.compute=fp32" in warning for warning in warnings)
    assert not list(precision_warnings(config, tmp_path / "none"))
