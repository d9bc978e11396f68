from __future__ import annotations

import pytest

from megatron_bert.config import row_memory
from megatron_bert.config.checks import check_config
from tests.config.conftest import Build, refusal

GIGABYTE = 10**9


@pytest.fixture(autouse=True)
def machine_of_16_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "usable_memory", lambda: 16 * GIGABYTE)


@pytest.mark.parametrize("key", ["batch.global_size", "curriculum.1.batch.global_size"])
@pytest.mark.parametrize("rows", [999_999_999, 99_999_999_999, 10**25])
def test_a_step_of_more_rows_than_memory_holds_is_refused_with_the_most_that_it_does(
    build: Build, key: str, rows: int
) -> None:
    message = refusal(build, f"{key}={rows}")
    assert message.startswith(f"{key} = {rows}: a rank's {rows:,} rows of ")
    most = int(message.rpartition("use at most ")[2])
    check_config(build(f"{key}={most}"), world_size=1)
    assert f"use at most {most}" in refusal(build, f"{key}={most + 1}")


def test_ranks_share_the_rows_of_a_step(build: Build) -> None:
    message = refusal(build, "batch.global_size=999999999")
    most = int(message.rpartition("use at most ")[2])
    check_config(build(f"batch.global_size={8 * most}"), world_size=8)


@pytest.mark.parametrize("steps", [999_999_999_999, 10**25])
def test_a_run_of_more_rows_than_memory_has_room_to_plan_is_refused(
    build: Build, steps: int
) -> None:
    message = refusal(build, f"curriculum.1.steps={steps}")
    assert message.startswith(f"curriculum.1.steps = {steps}: with steps of ")
    assert "half of this job's is 8.0 GB" in message
    most = int(message.rpartition("use at most ")[2])
    check_config(build(f"curriculum.1.steps={most}"), world_size=1)
    refusal(build, f"curriculum.1.steps={most + 1000}")
