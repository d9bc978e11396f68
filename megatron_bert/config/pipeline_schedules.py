"""The schedules of a pipeline, and what each implies for the rest of the configuration.

The order in which they compute is in `parallel.schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ScheduleName = Literal["1f1b", "interleaved", "zero_bubble"]


@dataclass(frozen=True)
class PipelineSchedule:
    """What distinguishes a schedule apart from its order.

    Attributes:
        interleaves: each rank holds several stages; micro-batches come in rounds of one per rank.
        splits_backward: the backward pass is split in two: the inputs' gradients at once, the
            weights' where the rank would otherwise wait.
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
"""The schedule that holds for a single pipeline rank, whatever is configured."""
