"""A pipeline's times are those of the schedule that trains, and never less than their bound."""

from __future__ import annotations

import pytest

from megatron_bert.config.pipeline_schedules import ScheduleName
from megatron_bert.parallel.actions import StageTime
from megatron_bert.parallel.schedule import make_schedule, simulate
from megatron_bert.planner.layouts import Layout, all_splits
from megatron_bert.planner.pipeline_times import TimedSchedule
from megatron_bert.planner.step import StepModel
from tests.planner.jobs import VOCABULARY, job


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


@pytest.mark.parametrize(("ranks", "micro_tokens"), [(12, 8192), (12, 131_072), (8, 32_768)])
def test_no_pipeline_waits_less_than_the_least_that_it_may(ranks: int, micro_tokens: int) -> None:
    # 23 blocks: some stages have one more than others.
    planned = job(ranks, "model.num_layers=23")
    piped = [
        split
        for split in all_splits(planned.config, ranks, VOCABULARY)
        if split.pipeline > 1 and split.tensor < 4 and split.virtual < 4
    ]
    assert {split.schedule for split in piped} == {"1f1b", "interleaved", "zero_bubble"}
    for split in piped:
        for span in (planned.spans[0], planned.spans[-1]):
            model = StepModel(planned, Layout(split, micro_tokens, "none"), span)
            assert model.least_bubble <= model.simulated_bubble() * (1 + 1e-9), split
