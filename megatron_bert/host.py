"""What a process may use of its machine; a container, a job or `taskset` may limit it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> int:
    """How many cores this process may use; `os.cpu_count` counts all that the machine has.

    Args:
        mount: where control groups are mounted.
        membership: the file that says which groups this process is in.
    """
    quotas = _cpu_quotas(mount, membership)
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def usable_memory(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> int:
    """Bytes of memory that this process and its neighbours in the same job have.

    Args:
        mount: see `usable_cores`.
        membership: see `usable_cores`.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_memory_limits(mount, membership)])


def _cpu_quotas(mount: Path, membership: Path) -> Iterator[int]:
    """Cores for which a control group gives time, rounded up."""
    for folder in _groups(mount, membership, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        # "max" and -1 stand for no limit.
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            yield -(-int(quota) // int(period))


def _memory_limits(mount: Path, membership: Path) -> Iterator[int]:
    for folder in _groups(mount, membership, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        if limit.isdecimal() and int(limit) > 0:
            yield int(limit)


def _groups(mount: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, and of those around them.

    A line of `membership` is `number:controllers:path` (cgroups(7)); version 2 has a single line
    without controllers. Inside a container the path may be that of the host: then the mount's root
    is the container's own group.
    """
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = mount
        elif controller in controllers.split(","):
            root = mount / controller
        else:
            continue
        group = root / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _text(file: Path) -> str:
    """A small file's text; empty where there is none."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
