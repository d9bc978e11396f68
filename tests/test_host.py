from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_bert.host import usable_cores, usable_memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limit(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("job", "step", "expected"),
    [("3000000", "max", 3_000_000), ("3000000", "2000000", 2_000_000), ("max", "max", MACHINE)],
)
def test_the_least_limit_of_the_groups_around_a_process_counts(
    tmp_path: Path, job: str, step: str, expected: int
) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/system.slice/job_1/step_0\n")
    mount = tmp_path / "mount"
    _limit(mount / "system.slice/job_1", "memory.max", job)
    _limit(mount / "system.slice/job_1/step_0", "memory.max", step)
    # Outside the mount nothing counts.
    _limit(tmp_path, "memory.max", "1000000")
    assert usable_memory(mount, membership) == expected


def test_version_1_limits_the_memory_controllers_group(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("9:cpu,cpuacct:/other\n4:memory:/slurm/job_1\n0::/\n")
    mount = tmp_path / "mount"
    _limit(mount / "memory/slurm", "memory.limit_in_bytes", "9223372036854771712")
    _limit(mount / "memory/slurm/job_1", "memory.limit_in_bytes", "4000000")
    _limit(mount / "cpu,cpuacct/other", "memory.limit_in_bytes", "1000000")
    assert usable_memory(mount, membership) == 4_000_000


def test_in_a_container_the_mounts_root_counts(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/docker/of_the_host\n")
    _limit(tmp_path / "mount", "memory.max", "5000000")
    assert usable_memory(tmp_path / "mount", membership) == 5_000_000


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert usable_memory(tmp_path, tmp_path / "none") == MACHINE


@pytest.mark.parametrize(
    ("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None)]
)
def test_cores_are_those_that_a_group_gives_time_for(
    tmp_path: Path, quota: str, cores: int | None
) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job\n")
    _limit(tmp_path / "mount" / "job", "cpu.max", quota)
    allowed = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path / "mount", membership) == (cores or allowed)


def test_version_1_gives_time_by_a_quota_and_a_period(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("3:cpu,cpuacct:/job\n")
    job = tmp_path / "mount" / "cpu" / "job"
    _limit(job, "cpu.cfs_quota_us", "150000")
    _limit(job, "cpu.cfs_period_us", "100000")
    # Without a limit.
    _limit(job.parent, "cpu.cfs_quota_us", "-1")
    _limit(job.parent, "cpu.cfs_period_us", "100000")
    assert usable_cores(tmp_path / "mount", membership) == min(2, len(os.sched_getaffinity(0)))
