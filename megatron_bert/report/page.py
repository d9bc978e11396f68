"""The page: everything about some runs in one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_bert.command_line.places import write_output
from megatron_bert.report import events, settings, timeline
from megatron_bert.report.curves import AXES, Chart, charts_of, positions
from megatron_bert.report.records import RunRecords, names_of
from megatron_bert.report.svg import COLOURS, DASHES, Mark, draw

_AXIS_NAMES = {"step": "steps", "tokens": "tokens", "seconds": "time"}
_SAMPLE = '<svg viewBox="0 0 24 8" class="{colour}"><path class="line {dash}" d="M0 4H24"/></svg>'


def write_page(runs: Sequence[RunRecords], output: Path) -> None:
    """Write the page about one run, or about several with their curves in the same charts.

    Raises:
        UserError: two runs are the same directory, or the page cannot be written.
    """
    write_output(output, page_of(runs))


def page_of(runs: Sequence[RunRecords]) -> str:
    """The page's text; the same runs give the same.

    Raises:
        UserError: two runs are the same directory.
    """
    names = names_of(runs)
    title = html.escape(", ".join(names))
    style, script = _asset("page.css"), _asset("page.js")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
            f"<title>{title}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            f"<h1>{title}</h1>",
            *_facts(runs, names),
            "<h2>Curves</h2>",
            *_switch(names),
            "<main>",
            *_charts(runs),
            *_timelines(runs, names),
            *_events(runs, names),
            *_settings(runs, names),
            "</main>",
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")


def _policy(script: str) -> str:
    """Have a browser load nothing for the page, and run no script but the page's own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _facts(runs: Sequence[RunRecords], names: Sequence[str]) -> Iterator[str]:
    """A line for each fact; with several runs a column for each of them."""
    facts = [run.facts() for run in runs]
    labels = dict.fromkeys(label for told in facts for label in told)
    rows = {label: [told.get(label, settings.ABSENT) for told in facts] for label in labels}
    yield from _columns(rows, names, "facts")


def _columns(
    rows: Mapping[str, Sequence[str]], names: Sequence[str], kind: str = ""
) -> Iterator[str]:
    several = len(names) > 1
    yield f'<div class="wide"><table class="{kind}{" several" if several else ""}">'
    if several:
        yield f"<thead><tr><th></th>{_cells('th', names)}</tr></thead>"
    yield "<tbody>"
    for label, texts in rows.items():
        # If there is little room, a key may break between its words.
        name = re.sub(r"([._])", r"\1<wbr>", html.escape(label))
        yield f"<tr><th>{name}</th>{_cells('td', texts)}</tr>"
    yield "</tbody></table></div>"


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _switch(names: Sequence[str]) -> Iterator[str]:
    """The choice of the x axis, which works without a script, and the runs' colours."""
    for axis in AXES:
        checked = " checked" if axis == AXES[0] else ""
        yield f'<input type="radio" name="axis" class="axis" id="by-{axis}"{checked}>'
    labels = (f'<label for="by-{axis}">{_AXIS_NAMES[axis]}</label>' for axis in AXES)
    yield f'<div class="bar"><span class="switch">{"".join(labels)}</span>'
    if len(names) > 1:
        for number, name in enumerate(names):
            sample = _SAMPLE.format(colour=f"c{number % COLOURS}", dash="d0")
            yield f'<span class="key">{sample}{html.escape(name)}</span>'
    yield "</div>"


def _charts(runs: Sequence[RunRecords]) -> Iterator[str]:
    charts = charts_of(runs)
    marks = {axis: list(_marks(runs, axis)) for axis in AXES}
    yield (
        '<p class="note">Dotted lines: a stage begins, with its row length. Dashed: a job goes on. '
        "Red strokes: a skipped update or a spike. A light band: the range of the values that a "
        'point is the mean of. <span class="live">Point at a chart to read its values.</span></p>'
    )
    yield '<div class="charts">'
    for chart in charts:
        yield f"<figure><figcaption><b>{html.escape(chart.title)}</b>"
        yield f'<span class="unit">{html.escape(chart.unit)}</span>'
        yield from _legend(chart, len(runs))
        yield "</figcaption>"
        yield from (draw(chart, axis, len(runs), marks[axis]) for axis in AXES)
        yield '<p class="readout"></p></figure>'
    yield "</div>"


def _marks(runs: Sequence[RunRecords], axis: str) -> Iterator[Mark]:
    for number, run in enumerate(runs):
        places = positions(run).get(axis)
        if places is not None:
            for moment in events.moments(run):
                yield Mark(number, moment.kind, float(places[moment.row]), moment.label)


def _legend(chart: Chart, num_runs: int) -> Iterator[str]:
    """What the kinds of curves look like, where there are several."""
    kinds = chart.names()
    if len(kinds) < 2:
        return
    for number, name in enumerate(kinds):
        colour = f"c{number % COLOURS}" if num_runs == 1 else ""
        dash = f"d{(number // COLOURS if num_runs == 1 else number) % DASHES}"
        yield f'<span class="key">{_SAMPLE.format(colour=colour, dash=dash)}'
        yield f"{html.escape(name)}</span>"


def _timelines(runs: Sequence[RunRecords], names: Sequence[str]) -> Iterator[str]:
    """Each pipeline schedule once, with the runs that took it."""
    found: dict[timeline.Timeline, list[str]] = {}
    for name, run in zip(names, runs, strict=True):
        drawing = timeline.timeline_of(run.config_text())
        if drawing is not None:
            found.setdefault(drawing, []).append(name)
    if found:
        yield "<h2>Pipeline</h2>"
    for drawing, whose in found.items():
        which = f"<b>{html.escape(', '.join(whose))}</b>" if len(runs) > 1 else ""
        yield f'<figure class="timeline"><figcaption>{which}<span>{drawing.text}</span>'
        for kind, text in drawing.legend:
            sample = f'<svg viewBox="0 0 24 8"><rect class="{kind}" width="24" height="8"/></svg>'
            yield f'<span class="key">{sample}{text}</span>'
        yield f"</figcaption>{drawing.svg}</figure>"


def _events(runs: Sequence[RunRecords], names: Sequence[str]) -> Iterator[str]:
    yield "<h2>Events</h2>"
    for run, name in zip(runs, names, strict=True):
        if len(runs) > 1:
            yield f"<h3>{html.escape(name)}</h3>"
        yield "<table><thead><tr><th>step</th><th>what</th><th></th></tr></thead><tbody>"
        for event in events.events_of(run):
            yield f"<tr>{_cells('td', (f'{event.step:,}', event.kind, event.text))}</tr>"
        yield "</tbody></table>"


def _settings(runs: Sequence[RunRecords], names: Sequence[str]) -> Iterator[str]:
    texts = [run.config_text() for run in runs]
    if len(runs) == 1:
        yield f"<h2>Configuration</h2>\n<pre>{html.escape(texts[0] or '')}</pre>"
        return
    yield "<h2>Configuration: what differs</h2>"
    if rows := settings.differences(texts):
        yield from _columns(rows, names)
    else:
        yield '<p class="note">Nothing but the directory.</p>'
    for name, text in zip(names, texts, strict=True):
        yield f"<details><summary>{html.escape(name)}: all of it</summary>"
        yield f"<pre>{html.escape(text or 'no config.yaml')}</pre></details>"
