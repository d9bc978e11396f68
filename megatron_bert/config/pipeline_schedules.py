"""The schedules of a pipeline, and what each implies for the rest of the configuration.

In which order they compute is in `parallel.schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ScheduleName = Literal["1f1b", "interleaved", "zero_bubble"]


@dataclass(frozen=True)
class PipelineSchedule:
    """What distinguishes a schedule beside its order.

    Attributes:
        interleaves: each rank holds several stages; micro-batches come in rounds of one a rank.
        splits_backward: a backward pass is two: inputs' gradients at once, weights' where the rank
            would wait.
    """

    interleaves: bool
    splits_backward: bool


SCHEDULES: Mapping[ScheduleName, PipelineSchedule] = MappingProxyType(
    {
        "1f1b": PipelineSchedule(interleaves=False, splits_backward=False),
        "interleaved": PipelineSchedule(interleaves=True, splits_backward=False),
        "zero_bubble": PipelineSchedule(interleaves=True, splits_backward=True),
    }
)

PLAIN_SCHEDULE: ScheduleName = "1f1b"
"""What a single rank counts as, whatever its schedule is called."""
