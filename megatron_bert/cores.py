"""The cores that there are to work on."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """How many cores this process may use.

    A scheduler, a container or `taskset` may leave it fewer than the machine has, which is what
    `os.cpu_count` counts.
    """
    return len(os.sched_getaffinity(0))
