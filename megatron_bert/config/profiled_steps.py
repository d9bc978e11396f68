"""Which steps of a run are profiled."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config

# Recordings stay in memory until the last of the steps.
MOST_STEPS = 20


def profiled_steps(config: Config) -> range:
    """The steps to profile, counted from 1; none by default.

    Args:
        config: checked by `profile_problems`.
    """
    if config.profile.steps is None:
        return range(0)
    first, last = map(int, config.profile.steps.split(":"))
    return range(first, last + 1)


def profile_problems(config: Config) -> Iterator[str]:
    """Problems with `profile.steps`."""
    given = config.profile.steps
    if given is None:
        return
    key, total = f"profile.steps = {given}", Curriculum(config).total_steps
    if re.fullmatch(r"[0-9]{1,18}:[0-9]{1,18}", given) is None:
        yield f"{key}: give the first and the last step, e.g. {min(10, total)}:{min(12, total)}"
        return
    steps = profiled_steps(config)
    if not steps:
        yield f"{key}: the last step comes before the first; give {steps.stop - 1}:{steps.start}"
    elif steps.start < 1 or steps.stop > total + 1:
        yield f"{key}: the run's steps are 1:{total}; use some of them"
    elif len(steps) > MOST_STEPS:
        yield (
            f"{key}: {len(steps):,} steps, which are recorded in memory; use at most {MOST_STEPS}, "
            f"e.g. {steps.start}:{steps.start + 2}"
        )
