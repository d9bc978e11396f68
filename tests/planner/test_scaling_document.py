"""docs/scaling.md shows what the planner predicts now, and its measurements support it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bert.config.errors import ConfigError
from megatron_bert.parallel.actions import StageTime
from megatron_bert.parallel.schedule import ScheduleName, make_schedule, simulate
from megatron_bert.planner.emit_scaling import main, render

DOCS = Path(__file__).resolve().parents[2] / "docs"


# Thirty plans.
@pytest.mark.slow
def test_the_predicted_tables_are_fresh() -> None:
    guide = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert render(guide) == guide, "run python -m megatron_bert.planner.emit_scaling"


def test_a_guide_without_its_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scaling.md").write_text("nothing")
    with pytest.raises(ConfigError, match="markers"):
        main(["--docs", str(tmp_path)])


# The table of docs/scaling.md: ranks, schedule, seconds of the quickest step. Stages sleep 100 ms
# forward, 200 ms backward, over as many stages as a rank has; four micro-batches a rank.
@pytest.mark.parametrize(
    ("ranks", "measured"),
    [
        (2, {"1f1b": 2.7818, "interleaved": 2.7134, "zero_bubble": 2.6944}),
        (4, {"1f1b": 5.9109, "interleaved": 5.6654, "zero_bubble": 5.6496}),
    ],
)
def test_what_a_pipeline_took_is_its_simulation_and_one_time_for_each_computation(
    ranks: int, measured: dict[ScheduleName, float]
) -> None:
    beyond = {}
    for name, seconds in measured.items():
        virtual = 1 if name == "1f1b" else 2
        schedule = make_schedule(name, ranks, 4 * ranks, virtual)
        stages = [StageTime(*[0.1 / virtual] * 3)] * schedule.num_stages
        computations = sum(not action.is_message for action in schedule.actions[0])
        beyond[name] = (seconds - simulate(schedule, stages).duration) / computations
    assert all(0.0 < each < 0.010 for each in beyond.values())
    assert max(beyond.values()) < 1.15 * min(beyond.values())
