"""What a process may use of its machine; a container, a job or `taskset` may limit it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """How many cores this process may use; `os.cpu_count` counts all that the machine has."""
    return len(os.sched_getaffinity(0))


def usable_memory(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> int:
    """Bytes of memory that this process and its neighbours in the same job have.

    Args:
        mount: where control groups are mounted.
        membership: the file that says which groups this process is in.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits(mount, membership)])


def _limits(mount: Path, membership: Path) -> Iterator[int]:
    """The limits of this process's control groups and of those around them.

    A line of `membership` is `number:controllers:path` (cgroups(7)); version 2 has a single line
    without controllers. Inside a container the path may be that of the host: then the mount's root
    is the container's own group.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            limit = _number(folder / name)
            if limit is not None:
                yield limit


def _number(file: Path) -> int | None:
    """What a limit's file says; None where there is no limit or no file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() and int(text) > 0 else None
