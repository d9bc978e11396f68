from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bert.benchmark.data import megatron_core
from megatron_bert.benchmark.data.megatron_core import measure_megatron_core
from megatron_bert.benchmark.process import run_isolated


@pytest.mark.peers
def test_megatron_core_makes_samples_of_every_length(tmp_path: Path) -> None:
    if not megatron_core.is_installed():
        pytest.skip("megatron-core is not installed")
    figures = run_isolated(measure_megatron_core, tmp_path, (128, 512), 2000, 1)
    assert sorted(figures.tokens_per_second_per_core) == [128, 512]
    assert all(rate > 1000 for rate in figures.tokens_per_second_per_core.values())
