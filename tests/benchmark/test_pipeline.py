"""The pipeline's benchmark runs, and its figures are of one another."""

from __future__ import annotations

import json

import pytest

from megatron_bert.benchmark.pipeline import measure as pipeline
from megatron_bert.benchmark.pipeline.table import pipeline_table


@pytest.mark.slow
def test_every_schedule_is_measured_beside_its_prediction() -> None:
    figures = pipeline.measure_pipeline(pipeline.QUICK, lambda _: None)
    one, interleaved, zero_bubble = figures.schedules
    assert one.formula_idle_share == pytest.approx(1 / 5)
    assert interleaved.formula_idle_share == pytest.approx(1 / 9, abs=1e-4)
    assert zero_bubble.formula_idle_share is None
    for schedule in figures.schedules:
        # A rank never waits less than the order of the work makes it wait.
        assert schedule.measured_idle_share > schedule.simulated_idle_share - 0.01
    json.dumps(figures.document())
    assert sum(line.startswith("idle:") for line in pipeline_table(figures)) == 3
