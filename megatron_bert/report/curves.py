"""The curves to draw of some runs, thinned to as many points as can be told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.config.leaves import leaves
from megatron_bert.report.records import Floats, RunRecords
from megatron_bert.run.journal import SAVE

AXES = ("step", "tokens", "seconds")
# Points per curve; more would only be drawn over one another.
POINTS = 300
# Points per curve of one kind of a text's tokens: there are many, which would fill the page.
POINTS_OF_KINDS = 60
# Fields of a training line that have no curve: counters, and what is not a measurement.
_UNDRAWN = {
    "step", "stage", "seq_length", "tokens", "masked_tokens", "consumed_rows", "spike_limit",
}  # fmt: skip
_LENGTHS = "_seq_length"
_HELD_OUT = "held-out "
_SHARE = "share guessed right"


@dataclass(frozen=True)
class Curve:
    """A measurement of a run, over its course.

    Attributes:
        run: which of the runs, from 0.
        name: what it is, among others of the chart; empty if there is only one.
        x: the position of each point, by axis (`AXES`).
        y: the points; NaN: a gap.
        low, high: the least and greatest value that went into each point.
        dots: whether each point was measured by itself, and has a dot.
    """

    run: int
    name: str
    x: Mapping[str, Floats]
    y: Floats
    low: Floats
    high: Floats
    dots: bool = False


@dataclass
class Chart:
    """Curves in one picture.

    Attributes:
        title: what they show.
        unit: unit of the values.
        logarithmic: whether the values' axis is logarithmic.
        curves: at least one.
    """

    title: str
    unit: str = ""
    logarithmic: bool = False
    curves: list[Curve] = field(default_factory=list)

    def names(self) -> list[str]:
        """The kinds of curves in it, in the order in which they first occur."""
        return list(dict.fromkeys(curve.name for curve in self.curves))


def charts_of(runs: Sequence[RunRecords]) -> list[Chart]:
    """All charts for which one of the runs has measurements, the most looked at first."""
    charts = {
        "loss": Chart("Loss", "nats a masked token"),
        "held-out fixed_loss": Chart("Held-out loss at the fixed length", "nats a masked token"),
        "held-out loss": Chart("Held-out loss at the stage's length", "nats a masked token"),
        "held-out accuracy": Chart("Masked accuracy, held out", _SHARE),
        "held-out fixed_accuracy": Chart("Masked accuracy at the fixed length", _SHARE),
        "lr": Chart("Learning rate"),
        "grad_norm": Chart("Gradient norm", "before clipping", logarithmic=True),
        "tokens_per_second": Chart("Throughput", "token slots a second"),
        "mfu": Chart("MFU", "share of the dense BF16 peak"),
        "tflops_per_gpu": Chart("TFLOP/s of a GPU"),
        "memory": Chart("Peak memory", "GB of the first GPU"),
        "seconds": Chart("Time of steps, evaluations and saves", "seconds", logarithmic=True),
    }
    for number, run in enumerate(runs):
        for key, curve in [*_training(number, run), *_saves(number, run), *_held_out(number, run)]:
            charts.setdefault(key, _unforeseen(key)).curves.append(curve)
    for measure in ("loss", "accuracy"):
        # With one length and one masking rate these are the stages' own measurements.
        if _repeats(charts[f"held-out fixed_{measure}"], charts[f"held-out {measure}"]):
            del charts[f"held-out fixed_{measure}"]
    first = sorted(charts, key=lambda key: (key != "loss", not key.startswith(_HELD_OUT)))
    return [charts[key] for key in first if charts[key].curves]


def _unforeseen(key: str) -> Chart:
    """A chart titled by name, for a measurement without one of its own or for one text's kinds."""
    measure, colon, text = key.removeprefix(_HELD_OUT).partition(": ")
    if not measure.startswith("accuracy"):
        return Chart(_words(measure) + colon + text)
    return Chart(_words(f"masked_{measure}") + colon + text, _SHARE)


def _training(number: int, run: RunRecords) -> Iterator[tuple[str, Curve]]:
    """Yield each measurement of the training lines: the key of its chart, and its curve."""
    x = {axis: thinned(at) for axis, at in positions(run).items()}
    for name, values in run.columns.items():
        if name in _UNDRAWN or not np.isfinite(values).any():
            continue
        key, kind = _shared(name) or (name, "training" if name == "loss" else "")
        yield key, Curve(number, kind, x, *_buckets(values))


def _saves(number: int, run: RunRecords) -> Iterator[tuple[str, Curve]]:
    """How long training stood still for each save; for steps that were repeated, the last save."""
    stood = {
        line["step"]: line["blocked_seconds"]
        for line in run.journal
        if line["event"] == SAVE and line["step"] <= run.last_step
    }
    if stood:
        steps = sorted(stood)
        x = {axis: thinned(at) for axis, at in _positions_at(run, steps).items()}
        stood_still = np.array([stood[step] for step in steps])
        yield "seconds", Curve(number, "Save", x, *_buckets(stood_still), dots=True)


def _held_out(number: int, run: RunRecords) -> Iterator[tuple[str, Curve]]:
    """Yield each measurement of the evaluation lines: the key of its chart, and its curve."""
    texts = {text for line in run.evaluations for text in line.get("valid", {})}
    # The mean over one text is that text's.
    mean = texts.pop() if len(texts) == 1 else "all texts"
    found: dict[tuple[str, str, bool], dict[int, float]] = {}
    for at, line in enumerate(run.evaluations):
        for path, value in _measurements(line):
            found.setdefault(_place(path, mean), {})[at] = value
    places = _positions_at(run, [line["step"] for line in run.evaluations])
    for (group, name, is_kind), by_line in found.items():
        lines = list(by_line)
        most = POINTS_OF_KINDS if is_kind else POINTS
        x = {axis: thinned(values[lines], most) for axis, values in places.items()}
        points = _buckets(np.array(list(by_line.values())), most)
        if is_kind:
            points = (points[0],) * 3  # bands would hide the other curves
        dots = len(lines) <= most
        key, kind = _shared(group) or (f"{_HELD_OUT}{group}", name)
        yield key, Curve(number, kind, x, *points, dots=dots)
        if (group, name) == ("loss", mean):
            yield "loss", Curve(number, "held out", x, *points, dots=dots)


def _positions_at(run: RunRecords, steps: Sequence[int]) -> dict[str, Floats]:
    """Where on each axis something that was done after these steps lies."""
    # Its record may have been written before the step's own line.
    rows = np.minimum(np.searchsorted(run.columns["step"], steps), len(run.columns["step"]) - 1)
    return {axis: values[rows] for axis, values in positions(run).items()}


def _shared(name: str) -> tuple[str, str] | None:
    """The chart that measurements of one unit share, and this one's name in it; None if none."""
    for ending, chart in (("_memory_gb", "memory"), ("_seconds", "seconds")):
        if name.endswith(ending):
            return chart, _words(name.removesuffix(ending))
    return None


def _measurements(line: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers of an evaluation line with their paths, at whatever depth they are."""
    for keys, value in leaves(line):
        path = tuple(map(str, keys))
        counts_on = len(path) == 1 and path[0] in _UNDRAWN
        if isinstance(value, int | float) and not (path[-1].endswith(_LENGTHS) or counts_on):
            yield path, float(value)


def _place(path: tuple[str, ...], mean: str) -> tuple[str, str, bool]:
    """Return what is measured, the text or kind of a text's tokens, and whether it is a kind."""
    if path[0] == "valid" and len(path) > 2:
        text, (measure, *kind) = path[1], path[2:]
    else:
        text, measure, kind = mean, path[0].removeprefix("valid_"), list(path[1:])
    return (f"{measure}: {text}", ", ".join(kind), True) if kind else (measure, text, False)


def positions(run: RunRecords) -> dict[str, Floats]:
    """Where each training line lies, by axis; an axis that the metrics lack is left out."""
    positions = {"step": run.columns["step"]}
    if "tokens" in run.columns:
        positions["tokens"] = run.columns["tokens"]
    if "step_seconds" in run.columns:
        positions["seconds"] = run.seconds()
    return positions


def thinned(values: Floats, most: int = POINTS) -> Floats:
    """Means over runs of neighbouring values, at most `most` of them."""
    return _buckets(values, most)[0]


def _buckets(values: Floats, most: int = POINTS) -> tuple[Floats, Floats, Floats]:
    """Mean, least and greatest over runs of neighbouring values, at most `most` of them.

    Values that are not finite are ignored; a bucket without any other value is NaN.
    """
    size = ceil_div(len(values), most)
    firsts = np.arange(0, len(values), size)
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, firsts, dtype=np.int64)
    total = np.add.reduceat(np.where(finite, values, 0.0), firsts)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), firsts)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), firsts)
    mean = np.divide(total, count, out=np.full(len(firsts), np.nan), where=count > 0)
    return mean, np.where(count, low, np.nan), np.where(count, high, np.nan)


def _repeats(chart: Chart, other: Chart) -> bool:
    """Whether each curve of a chart is in another chart too."""
    others = {(curve.run, curve.name): curve.y for curve in other.curves}
    return all(
        np.array_equal(curve.y, others.get((curve.run, curve.name), np.empty(0)))
        for curve in chart.curves
    )


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
