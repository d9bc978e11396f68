from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.report.curves import POINTS, Chart, charts_of
from megatron_bert.report.records import RunRecords
from megatron_bert.report.scales import Scale, scale_over, short, time_unit
from megatron_bert.report.svg import draw
from megatron_bert.run.journal import SAVE

TIMES = "Time of steps, evaluations and saves"


def run_of(
    steps: int, evaluations: list[dict[str, object]] | None = None, **columns: object
) -> RunRecords:
    given = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
    standard = {
        "step": np.arange(1.0, steps + 1),
        "stage": np.zeros(steps),
        "seq_length": np.full(steps, 128.0),
        "loss": np.linspace(10, 2, steps),
        "tokens": 128.0 * np.arange(1, steps + 1),
        "step_seconds": np.full(steps, 2.0),
    }
    return RunRecords(Path("run"), standard | given, evaluations or [])


def chart(runs: list[RunRecords], title: str) -> Chart:
    (found,) = (chart for chart in charts_of(runs) if chart.title == title)
    return found


@pytest.mark.parametrize("steps", [1, POINTS, POINTS + 1, 454_000])
def test_a_curve_has_few_points_and_keeps_every_extreme(steps: int) -> None:
    loss = np.full(steps, 2.0)
    loss[steps // 2] = 50.0
    (curve,) = chart([run_of(steps, loss=loss)], "Loss").curves
    assert len(curve.y) <= POINTS
    assert len(curve.y) == len(curve.low) == len(curve.high) == len(curve.x["step"])
    assert (curve.high.max(), curve.y.mean()) == (50.0, pytest.approx(loss.mean(), abs=0.1))
    assert curve.x["seconds"][-1] == pytest.approx(2.0 * steps, rel=0.01)


def test_what_is_not_finite_is_a_gap_where_nothing_else_is_near() -> None:
    loss = np.full(2 * POINTS, 3.0)
    loss[10:14] = [np.nan, np.inf, np.nan, 5.0]
    (curve,) = chart([run_of(2 * POINTS, loss=loss)], "Loss").curves
    assert np.flatnonzero(np.isnan(curve.y)).tolist() == [5]
    assert curve.y[6] == curve.high[6] == 5.0


def test_held_out_curves_are_thinned_like_those_of_training() -> None:
    lines: list[dict[str, object]] = [
        {"step": step, "valid_loss": 50.0 if step == 700 else 2.0, "valid_accuracy": 0.5}
        for step in range(1, 10 * POINTS + 1)
    ]
    run = run_of(10 * POINTS, lines)
    for title, name in (("Loss", "held out"), ("Held-out loss at the stage's length", "all texts")):
        (curve,) = (curve for curve in chart([run], title).curves if curve.name == name)
        assert len(curve.y) == len(curve.low) == len(curve.x["step"]) == POINTS
        assert (curve.high.max(), curve.low.max(), curve.dots) == (50.0, 2.0, False)
        assert curve.x["tokens"][69] == 128 * np.arange(691, 701).mean()
    (few,) = chart([run_of(9, lines[:9])], "Masked accuracy, held out").curves
    assert few.dots


def test_a_band_breaks_where_its_line_does() -> None:
    loss = np.full(20 * POINTS, 3.0)
    loss[::2] = 4.0
    loss[1000:1100] = np.nan
    training = chart([run_of(20 * POINTS, loss=loss)], "Loss")
    for axis in ("step", "seconds"):
        drawn = draw(training, axis, 1, [])
        paths = dict(re.findall(r'<path class="(band|line) [^>]* d="([^"]+)"', drawn))
        assert paths["line"].count("M") == paths["band"].count("M") == paths["band"].count("Z") == 2
        last, first = (
            [float(x) for x in re.findall(r"[ML]([\d.]+)", piece)]
            for piece in paths["band"].removesuffix("Z").split("Z")
        )
        # Five points are missing between them, 1/300 of the width each.
        assert min(first) - max(last) == pytest.approx(6 * 412 / POINTS, abs=0.3)


def test_measurements_of_any_name_have_their_chart() -> None:
    run = run_of(
        3, data_seconds=[1, 1, 1], reserved_memory_gb=[7, 7, 8], temperature=[60, 61, np.nan]
    )
    assert chart([run], TIMES).names() == ["Step", "Data"]
    assert chart([run], "Peak memory").names() == ["Reserved"]
    assert chart([run], "Temperature").names() == [""]


def test_saves_and_evaluations_are_points_where_they_were() -> None:
    evaluations: list[dict[str, object]] = [
        {"step": step, "valid_loss": 2.0, "evaluation_seconds": 7.0} for step in (2, 4)
    ]
    saves = [
        {"event": SAVE, "step": step, "blocked_seconds": seconds}
        for step, seconds in [(3, 9.0), (5, 1.5), (3, 0.5), (6, 9.0)]
    ]
    run = replace(run_of(5, evaluations), journal=saves)
    found = {curve.name: curve for curve in chart([run], TIMES).curves}
    save, evaluation = found["Save"], found["Evaluation"]
    assert (save.dots, evaluation.dots, found["Step"].dots) == (True, True, False)
    assert (save.x["step"].tolist(), save.y.tolist()) == ([3.0, 5.0], [0.5, 1.5])
    assert (evaluation.x["step"].tolist(), evaluation.y.tolist()) == ([2.0, 4.0], [7.0, 7.0])


def test_held_out_scores_are_sorted_by_what_they_measure_and_of_what() -> None:
    kinds = {"han": 0.3, "latin_start": 0.4}
    scores = {"loss": 2.0, "accuracy": 0.5, "fixed_loss": 2.5, "fixed_accuracy": 0.4}
    line = {
        "step": 2,
        "stage": 0,
        "valid_seq_length": 128,
        "valid_loss": 2.5,
        "valid_accuracy": 0.45,
        "valid": {
            "wiki": scores | {"accuracy_by_characters": kinds},
            "law": scores | {"loss": 3.0},
        },
    }
    run = run_of(3, [line])
    assert chart([run], "Loss").names() == ["training", "held out"]
    assert chart([run], "Held-out loss at the stage's length").names() == [
        "all texts", "wiki", "law",
    ]  # fmt: skip
    assert chart([run], "Held-out loss at the fixed length").names() == ["wiki", "law"]
    by_characters = chart([run], "Masked accuracy by characters: wiki")
    assert (by_characters.names(), by_characters.unit) == (
        ["han", "latin_start"], "share guessed right",
    )  # fmt: skip
    (held_out,) = (c for c in chart([run], "Loss").curves if c.name == "held out")
    assert {axis: places.tolist() for axis, places in held_out.x.items()} == {
        "step": [2.0],
        "tokens": [256.0],
        "seconds": [4.0],
    }


def test_of_one_text_no_score_stands_twice() -> None:
    scores = {"loss": 2.0, "accuracy": 0.5, "fixed_loss": 2.0, "fixed_accuracy": 0.5}
    line = {"step": 1, "valid_loss": 2.0, "valid_accuracy": 0.5, "valid": {"wiki": scores}}
    charts = charts_of([run_of(2, [line])])
    held_out = [chart for chart in charts if "eld" in chart.title]
    assert [(chart.title, chart.names()) for chart in held_out] == [
        ("Held-out loss at the stage's length", ["wiki"]),
        ("Masked accuracy, held out", ["wiki"]),
    ]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 454_000, ["0", "100k", "200k", "300k", "400k"]), (1e-5, 1e-4, ["2e-5", "4e-5", "6e-5"])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[str]) -> None:
    assert [short(tick) for tick in Scale(low, high, 0, 1).ticks()][: len(ticks)] == ticks


@pytest.mark.parametrize("values", [[3.0], [0.0], [2.0, 2.0], [1e-9, 1e9], [5.0, np.nan], []])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_every_value_has_a_place_inside(values: list[float], logarithmic: bool) -> None:
    array = np.array(values)
    scale = scale_over([array], 10.0, 20.0, logarithmic=logarithmic)
    places = scale.place(array[np.isfinite(array)])
    assert ((places > 10.0) & (places < 20.0)).all()
    assert 0 < len(scale.ticks()) <= 12
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())


def test_zero_ends_a_logarithmic_scale() -> None:
    assert not scale_over([np.array([0.0, 1.0])], 0, 1, logarithmic=True).logarithmic


@pytest.mark.parametrize(
    ("seconds", "unit"), [(30, "seconds"), (600, "minutes"), (9e3, "hours"), (9e5, "days")]
)
def test_time_is_told_in_a_fitting_unit(seconds: float, unit: str) -> None:
    assert time_unit(seconds)[1] == unit
