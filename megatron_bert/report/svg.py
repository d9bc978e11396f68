"""A chart as an SVG element that takes its colours and fonts from the page's style sheet."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bert.report.curves import Chart, Curve
from megatron_bert.report.records import Floats
from megatron_bert.report.scales import Scale, scale_over, short, time_unit

WIDTH, HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 470, 18, 222
# Colours and dashes that the style sheet has.
COLOURS = 8
DASHES = 4
_LINES = ("stage", "job")
_STROKE = 10
# Labels nearer to each other would touch.
_LEAST_DISTANCE = 26.0


@dataclass(frozen=True)
class Mark:
    """A moment of a run.

    Attributes:
        run: which of the runs, from 0.
        kind: a class of the style sheet; stages and jobs are lines, all else short strokes.
        at: where it lies on the axis.
        label: text beside it; may be empty.
    """

    run: int
    kind: str
    at: float
    label: str


def draw(chart: Chart, axis: str, num_runs: int, marks: Sequence[Mark]) -> str:
    """Draw a chart over one axis.

    Args:
        chart: what to draw.
        axis: one of `curves.AXES`.
        num_runs: with several runs colours tell runs apart, with one kinds of curves.
        marks: where stages and jobs begin.

    Returns:
        An `<svg>` element; its data attributes tell how places become values again.
    """
    curves = [curve for curve in chart.curves if axis in curve.x]
    # All axes count from the run's start.
    ends = [float(curve.x[axis][-1]) for curve in curves]
    x = Scale(0.0, max((end for end in ends if end > 0), default=1.0), _LEFT, _RIGHT)
    unit, unit_name = time_unit(x.high) if axis == "seconds" else (1.0, axis)
    y = scale_over(
        [values for curve in curves for values in (curve.low, curve.high)],
        _BOTTOM,
        _TOP,
        logarithmic=chart.logarithmic,
    )
    label = {"tokens": "token slots", "seconds": f"{unit_name} in steps"}.get(axis, "step")
    parts = [
        *_frame(Scale(x.low / unit, x.high / unit, _LEFT, _RIGHT), y, label),
        *_marks(marks, x),
        *(_band(curve, x, y, axis, look(chart, curve, num_runs)) for curve in curves),
        *(_line(curve, x, y, axis, look(chart, curve, num_runs)) for curve in curves),
    ]
    return (
        f'<svg class="chart by-{axis}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(chart.title)} by {label}" '
        f'data-x="{x.low / unit!r} {x.high / unit!r} {_LEFT} {_RIGHT}" '
        f'data-y="{y.low!r} {y.high!r} {_BOTTOM} {_TOP}" '
        f'data-log="{int(y.logarithmic)}" data-label="{label}">{"".join(parts)}</svg>'
    )


def look(chart: Chart, curve: Curve, num_runs: int) -> str:
    """The classes of a curve: its colour and its dashes."""
    kind = chart.names().index(curve.name)
    if num_runs > 1:
        return f"r{curve.run} c{curve.run % COLOURS} d{kind % DASHES}"
    # If there are more kinds than colours, the rest is dashed.
    return f"r0 c{kind % COLOURS} d{kind // COLOURS % DASHES}"


def _frame(x: Scale, y: Scale, label: str) -> Iterator[str]:
    for value, place in _placed(y):
        yield f'<path class="grid" d="M{_LEFT} {place:.1f}H{_RIGHT}"/>'
        yield f'<text class="y" x="{_LEFT - 6}" y="{place + 4:.1f}">{short(value)}</text>'
    for value, place in _placed(x):
        yield f'<path class="tick" d="M{place:.1f} {_BOTTOM}v4"/>'
        yield f'<text class="x" x="{place:.1f}" y="{_BOTTOM + 17}">{short(value)}</text>'
    yield f'<path class="edge" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>'
    yield f'<text class="x" x="{(_LEFT + _RIGHT) // 2}" y="{HEIGHT - 5}">{label}</text>'


def _placed(scale: Scale) -> Iterable[tuple[float, float]]:
    ticks = scale.ticks()
    return zip(ticks, scale.place(np.array(ticks)), strict=True)


def _marks(marks: Sequence[Mark], x: Scale) -> Iterator[str]:
    """Draw each mark; those of several runs in one place are merged, without a run's colour."""
    places = x.place(np.array([mark.at for mark in marks]))
    by_place: dict[tuple[str, str], list[Mark]] = {}
    for mark, place in zip(marks, places, strict=True):
        if np.isfinite(place):
            by_place.setdefault((mark.kind, f"{place:.1f}"), []).append(mark)
    last_label = -_LEAST_DISTANCE
    for (kind, at), here in sorted(by_place.items(), key=lambda item: float(item[0][1])):
        owner = f" r{here[0].run} c{here[0].run % COLOURS}" if len(here) == 1 else ""
        only = owner if len({mark.run for mark in marks}) > 1 else ""
        if kind not in _LINES:
            yield f'<path class="{kind}" d="M{at} {_BOTTOM}v-{_STROKE}"/>'
        elif float(at) > _LEFT:
            yield f'<path class="{kind}{only}" d="M{at} {_TOP}V{_BOTTOM}"/>'
        text = here[0].label
        if text and float(at) - last_label >= _LEAST_DISTANCE:
            last_label = float(at)
            # At the right edge a label is put before its line, or it would be cut off.
            anchor, place = ("start", 3) if float(at) < _RIGHT - _LEAST_DISTANCE else ("end", -3)
            yield (
                f'<text class="mark" text-anchor="{anchor}" x="{float(at) + place:.1f}" '
                f'y="{_TOP - 4}">{text}</text>'
            )


def _line(curve: Curve, x: Scale, y: Scale, axis: str, classes: str) -> str:
    places = x.place(curve.x[axis]), y.place(curve.y)
    line = (
        f'<path class="line {classes}" data-run="{curve.run}" '
        f'data-name="{html.escape(curve.name)}" d="{_path(*places)}"/>'
    )
    if not curve.dots:
        return line
    dots = "".join(
        f"M{across:.2f} {up:.2f}h0"
        for across, up in zip(*places, strict=True)
        if across == across and up == up
    )
    return f'{line}<path class="dots {classes}" d="{dots}"/>'


def _band(curve: Curve, x: Scale, y: Scale, axis: str, classes: str) -> str:
    """Draw the range of the values that went into each point, unless no point has one.

    The band breaks where the line does.
    """
    if not (curve.high > curve.low).any():
        return ""
    across, low, high = x.place(curve.x[axis]), y.place(curve.low), y.place(curve.high)
    known = np.flatnonzero(np.isfinite(across + low + high + y.place(curve.y)))
    pieces = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    outlines = (
        f"{_path(across[at], high[at], digits=1)}L"
        f"{_path(across[at][::-1], low[at][::-1], digits=1)[1:]}Z"
        for at in pieces
        if len(at) > 1
    )
    return f'<path class="band {classes}" d="{"".join(outlines)}"/>'


def _path(across: Floats, up: Floats, digits: int = 2) -> str:
    """Lines from point to point; a point without a place is a gap."""
    parts, pen = [], "M"
    for a, b in zip(across.tolist(), up.tolist(), strict=True):
        if a != a or b != b:
            pen = "M"
            continue
        parts.append(f"{pen}{a:.{digits}f} {b:.{digits}f}")
        pen = "L"
    return "".join(parts)
