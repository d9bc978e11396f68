"""What happened in a run, in words: jobs, skipped updates, spikes, checkpoints, how it ended."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bert.report.records import Remark, RunRecords, job_in_words

# Of a kind: a run that goes wrong for hours would fill the page.
_MOST = 100
_CHECKPOINT = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        step: the last step that was taken before, or the one it happened to.
        kind: in a word or two.
        text: in words.
    """

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Moment:
    """What is marked in the charts.

    Attributes:
        kind: `stage` or `job`, which begins (the first job is not marked); `skipped` or `spike`.
        row: the training line, from 0, at which it is.
        label: a stage's length; empty for all others.
    """

    kind: str
    row: int
    label: str


def moments(run: RunRecords) -> list[Moment]:
    """What is marked in a run's charts."""
    stages = [("stage", step, str(length)) for step, length in run.stage_starts()]
    jobs = [("job", job["step"] + 1, "") for job in run.jobs[1:]]
    remarks = [
        (kind, remark.step, "")
        for kind in ("skipped", "spike")
        for remark in [remark for remark in run.remarks if remark.kind == kind][:_MOST]
    ]
    return [
        Moment(kind, int(np.searchsorted(run.columns["step"], step)), label)
        for kind, step, label in [*stages, *jobs, *remarks]
    ]


def events_of(run: RunRecords) -> list[Event]:
    """All events of a run, in the order of their steps."""
    found = [
        *_starts(run),
        *(Event(step, "stage", f"rows of {length} tokens") for step, length in run.stage_starts()),
        *_shortened("update skipped", _skips(run)),
        *_shortened("loss spike", _spikes(run)),
        *(Event(step, "checkpoint", "saved, and kept") for step in _kept(run)),
        *_end(run),
    ]
    return sorted(found, key=lambda event: event.step)


def _starts(run: RunRecords) -> Iterator[Event]:
    for name in run.set_aside():
        yield Event(0, "set aside", f"{name}: steps that no checkpoint leads to")
    for number, job in enumerate(run.jobs):
        began = f", {job['began']}" if "began" in job else ""
        yield Event(job["step"], "restart" if number else "start", job_in_words(job) + began)


def _skips(run: RunRecords) -> list[Event]:
    """Skipped updates; those of steps in a row are one event."""
    skipped = [remark for remark in run.remarks if remark.kind == "skipped"]
    runs = itertools.groupby(enumerate(skipped), lambda item: item[1].step - item[0])
    return [_skip([remark for _, remark in group]) for _, group in runs]


def _skip(remarks: Sequence[Remark]) -> Event:
    first, last = remarks[0], remarks[-1]
    until = f" to step {last.step:,}" if last is not first else ""
    where = _rows(first.rows and last.rows and (first.rows[0], last.rows[1]))
    return Event(first.step, "", f"loss or gradient not finite{until}{where}")


def _spikes(run: RunRecords) -> list[Event]:
    return [
        Event(remark.step, "", f"far above the losses before it{_rows(remark.rows)}")
        for remark in run.remarks
        if remark.kind == "spike"
    ]


def _rows(rows: tuple[int, int] | None) -> str:
    return f", rows {rows[0]:,} to {rows[1]:,}" if rows else ""


def _shortened(kind: str, events: Sequence[Event]) -> Iterator[Event]:
    for event in events[:_MOST]:
        yield Event(event.step, kind, event.text)
    if len(events) > _MOST:
        more = f"{len(events) - _MOST:,} more, the last one at step {events[-1].step:,}"
        yield Event(events[_MOST].step, kind, more)


def _kept(run: RunRecords) -> list[int]:
    """Steps of the checkpoints that are there; others were removed as `checkpoint.keep` says."""
    names = (path.name for path in (run.directory / "checkpoints").glob("step_*"))
    return sorted(int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name)))


def _end(run: RunRecords) -> Iterator[Event]:
    if run.torn:
        yield Event(
            run.last_step, "torn line", "the metrics' last line: a job was killed, or is writing it"
        )
    if run.outcome is not None:
        yield Event(
            run.last_step, run.outcome.kind.lower(), run.outcome.reason or "all steps taken"
        )
