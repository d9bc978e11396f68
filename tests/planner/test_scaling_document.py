"""docs/scaling.md shows what the planner predicts now, and its measurements support it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bert.config.pipeline_schedules import ScheduleName
from megatron_bert.errors import ConfigError
from megatron_bert.planner import step
from megatron_bert.planner.compute import Passes, Seconds
from megatron_bert.planner.emit_scaling import PICTURE_FILE, main, render
from megatron_bert.planner.layouts import Layout, Split
from tests.planner.jobs import job

DOCS = Path(__file__).resolve().parents[2] / "docs"


# Thirty plans.
@pytest.mark.slow
def test_the_predicted_tables_are_fresh() -> None:
    guide = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert render(guide) == guide, "run python -m megatron_bert.planner.emit_scaling"


def test_the_picture_that_the_guide_shows_has_a_pipeline() -> None:
    assert f"({PICTURE_FILE})" in (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert "pipeline rank" in (DOCS / PICTURE_FILE).read_text(encoding="utf-8")


def test_a_guide_without_its_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scaling.md").write_text("nothing")
    with pytest.raises(ConfigError, match="markers"):
        main(["--docs", str(tmp_path)])


# The table of docs/scaling.md: ranks, schedule, seconds of the quickest step. Stages sleep 100 ms
# forward, 200 ms backward, over as many stages as a rank has; four micro-batches a rank.
@pytest.mark.parametrize(
    ("ranks", "computation", "measured"),
    [
        (2, 5.1e-3, {"1f1b": 2.7818, "interleaved": 2.7134, "zero_bubble": 2.6944}),
        (4, 6.8e-3, {"1f1b": 5.9109, "interleaved": 5.6654, "zero_bubble": 5.6496}),
    ],
)
def test_a_pipeline_idled_as_the_planner_says_with_one_time_for_each_computation(
    ranks: int,
    computation: float,
    measured: dict[ScheduleName, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept = 3 * 0.1 * 4 * ranks
    for name, seconds in measured.items():
        virtual = 1 if name == "1f1b" else 2
        third = 0.1 / virtual
        piece = Passes(
            forward=Seconds(gemm=third, host=computation),
            backward_input=Seconds(gemm=third, host=computation),
            # Only zero bubble computes them by themselves.
            backward_weight=Seconds(gemm=third, host=computation * (name == "zero_bubble")),
        )
        nothing = Passes(Seconds(), Seconds(), Seconds())
        monkeypatch.setattr(step, "_block", lambda _, piece=piece: piece)
        monkeypatch.setattr(step, "_ends", lambda _, nothing=nothing: (nothing, nothing))
        planned = job(
            ranks,
            f"model.num_layers={virtual * ranks}",
            f"batch.global_size={4 * ranks}",
            "curriculum=[{seq_length: 512, steps: 1}]",
        )
        # No time for messages: ranks of one host pass on what they have.
        monkeypatch.setattr(step.StepModel, "message", 0.0)
        layout = Layout(Split(1, False, ranks, name, virtual, 1), 512, "none")
        model = step.StepModel(planned, layout, planned.spans[0])
        predicted = model.busy + model.simulated_bubble()
        assert 1 - slept / predicted == pytest.approx(1 - slept / seconds, abs=0.01), name
