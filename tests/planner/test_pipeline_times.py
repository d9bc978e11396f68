"""A pipeline's times are those of the schedule that trains."""

from __future__ import annotations

import pytest

from megatron_bert.config.pipeline_schedules import ScheduleName
from megatron_bert.parallel.actions import StageTime
from megatron_bert.parallel.schedule import make_schedule, simulate
from megatron_bert.planner.pipeline_times import TimedSchedule


@pytest.mark.parametrize(
    ("schedule", "ranks", "micro_batches", "virtual"),
    [
        ("1f1b", 4, 11, 1),
        ("1f1b", 3, 2, 1),
        ("interleaved", 2, 8, 4),
        ("interleaved", 4, 12, 2),
        ("zero_bubble", 4, 12, 3),
    ],
)
def test_a_timed_schedule_takes_what_its_simulation_takes(
    schedule: ScheduleName, ranks: int, micro_batches: int, virtual: int
) -> None:
    timed = TimedSchedule(schedule, ranks, micro_batches, virtual)
    whole = make_schedule(schedule, ranks, micro_batches, virtual)
    for slower in (0.0, 0.3):
        stages = [StageTime(1 + slower * n, 1.5, 0.7 + slower) for n in range(ranks * virtual)]
        for message in (0.0, 0.4):
            expected = simulate(whole, stages, message).duration
            assert timed.duration(stages, message) == pytest.approx(expected, rel=1e-12)
