"""What happened in a run, in words: jobs, skipped updates, spikes, checkpoints, how it ended."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from megatron_bert.config.run_paths import RunPaths
from megatron_bert.report.records import Remark, RunRecords, job_in_words
from megatron_bert.run.directory import FAILED, FINISHED
from megatron_bert.run.journal import END, SAVE, SAVE_FAILED, START

# Events shown per kind, half of them the first: a run that goes wrong for hours would otherwise
# fill the page.
_MOST = 100
_T = TypeVar("_T")
_CHECKPOINT = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        step: the last step that was taken before, or the one it happened to.
        kind: in a word or two.
        text: in words.
        is_there: whether it left something that is still there: a checkpoint to go on from.
    """

    step: int
    kind: str
    text: str
    is_there: bool = False


@dataclass(frozen=True)
class Moment:
    """What is marked in the charts.

    Attributes:
        kind: `stage` or `job`, marked where it begins (the first job is not marked); `skipped` or
            `spike`.
        row: number of its training line, from 0.
        label: a stage's length; empty for all others.
    """

    kind: str
    row: int
    label: str


def moments(run: RunRecords) -> list[Moment]:
    """What is marked in a run's charts."""
    stages = [("stage", step, str(length)) for step, length in run.stage_starts()]
    jobs = [("job", job["step"] + 1, "") for job in _first_and_last(run.jobs[1:])]
    remarks = [
        (kind, remark.step, "")
        for kind in ("skipped", "spike")
        for remark in _first_and_last([remark for remark in run.remarks if remark.kind == kind])
    ]
    return [
        Moment(kind, int(np.searchsorted(run.columns["step"], step)), label)
        for kind, step, label in [*stages, *jobs, *remarks]
    ]


def events_of(run: RunRecords) -> list[Event]:
    """All events of a run, in the order in which they happened.

    An event from the metrics is listed in the last job that began before its step: of repeated
    steps the metrics have only the last pass, while jobs and saves are listed for all passes.
    """
    parts = _parts(run)
    for event in _measured(run):
        next(part for part in reversed(parts) if part.after < event.step).events.append(event)
    told = []
    for part in parts:
        # Order within a step: what was measured, what was saved, how it ended.
        told += sorted([*part.begin, *part.events, *part.rest], key=lambda event: event.step)
    return list(_bounded([*_set_aside(run), *told, *_end(run)]))


@dataclass
class _Part:
    """A job's events, or those before the first job.

    Attributes:
        after: the step after which it began.
        begin: its first event, if any.
        events: those measured.
        rest: those of `jobs.jsonl`.
    """

    after: int
    begin: list[Event] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    rest: list[Event] = field(default_factory=list)


def _parts(run: RunRecords) -> list[_Part]:
    parts = [_Part(-1)]
    kept = _kept(run)
    # If a step was saved several times, the last save is the one that is there.
    saves = {line["step"]: at for at, line in enumerate(run.journal) if line["event"] == SAVE}
    there = {saves[step] for step in kept & saves.keys()}
    for at, line in enumerate(run.journal):
        if line["event"] == START:
            parts.append(_Part(line["step"], [_start(line, "restart" if parts[1:] else "start")]))
        elif line["event"] == SAVE:
            parts[-1].rest.append(_save(line, is_there=at in there))
        elif line["event"] in (SAVE_FAILED, END):
            kind = line.get("outcome", line["event"])
            parts[-1].rest.append(_ended(line["step"], kind, line.get("reason", "")))
    return parts


def _ended(step: int, kind: str, reason: str) -> Event:
    """How a job or a save ended; only for a job that took all steps is the kind reason enough."""
    unsaid = "all steps taken" if kind == FINISHED else "no reason was given"
    return Event(step, kind.lower(), reason or unsaid)


def _measured(run: RunRecords) -> Iterator[Event]:
    """Events that `jobs.jsonl` does not tell; checkpoints, if an earlier version made them."""
    yield from (
        Event(step, "stage", f"rows of {length} tokens") for step, length in run.stage_starts()
    )
    yield from _skips(run)
    yield from _spikes(run)
    saves = {line["step"] for line in run.journal if line["event"] == SAVE}
    for step in sorted(_kept(run) - saves):
        yield Event(step, "checkpoint", "saved, and kept", is_there=True)


def _set_aside(run: RunRecords) -> Iterator[Event]:
    for name in run.set_aside():
        yield Event(0, "set aside", f"{name}: steps that no checkpoint leads to")


def _start(line: Mapping[str, Any], kind: str) -> Event:
    time = f", {line['time']}" if "time" in line else ""
    return Event(line["step"], kind, job_in_words(line) + time)


def _save(line: Mapping[str, Any], *, is_there: bool) -> Event:
    gone = "" if is_there else "; removed since"
    text = (
        f"saved in {line['seconds']:.1f} s, {_in_words(line['bytes'])}; training stood still for "
        f"{line['blocked_seconds']:.1f} s{gone}"
    )
    return Event(line["step"], "checkpoint", text, is_there)


def _in_words(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _skips(run: RunRecords) -> list[Event]:
    """Skipped updates; those of steps in a row are one event."""
    skipped = [remark for remark in run.remarks if remark.kind == "skipped"]
    runs = itertools.groupby(enumerate(skipped), lambda item: item[1].step - item[0])
    return [_skip([remark for _, remark in group]) for _, group in runs]


def _skip(remarks: Sequence[Remark]) -> Event:
    first, last = remarks[0], remarks[-1]
    until = f" to step {last.step:,}" if last is not first else ""
    where = _rows(first.rows and last.rows and (first.rows[0], last.rows[1]))
    return Event(first.step, "update skipped", f"loss or gradient not finite{until}{where}")


def _spikes(run: RunRecords) -> list[Event]:
    return [
        Event(remark.step, "loss spike", f"far above the losses before it{_rows(remark.rows)}")
        for remark in run.remarks
        if remark.kind == "spike"
    ]


def _rows(rows: tuple[int, int] | None) -> str:
    return f", rows {rows[0]:,} to {rows[1]:,}" if rows else ""


def _bounded(events: Sequence[Event]) -> Iterator[Event]:
    """Keep each kind's first and last events and what is still there; fold the others into one."""
    of_kind: dict[str, list[int]] = {}
    for place, event in enumerate(events):
        of_kind.setdefault(event.kind, []).append(place)
    folds: dict[int, Event | None] = {}
    for kind, places in of_kind.items():
        # Bounded too, since some runs never remove a checkpoint.
        there = [place for place in places if events[place].is_there][-_MOST:]
        hidden = sorted(set(places) - set(_first_and_last(places)) - set(there))
        if hidden:
            first, last = events[hidden[0]], events[hidden[-1]]
            folds |= dict.fromkeys(hidden)
            text = f"{len(hidden):,} more, the last of them at step {last.step:,}"
            folds[hidden[0]] = Event(first.step, kind, text)
    for place, event in enumerate(events):
        shown = folds.get(place, event)
        if shown is not None:
            yield shown


def _first_and_last(items: Sequence[_T]) -> Sequence[_T]:
    """At most `_MOST` items, half of them the first, half the last."""
    half = _MOST // 2
    return items if len(items) <= _MOST else [*items[:half], *items[-half:]]


def _kept(run: RunRecords) -> set[int]:
    """Steps of the checkpoints that are still there; `checkpoint.keep` removes others."""
    names = (path.name for path in RunPaths(run.directory).checkpoints.glob("step_*"))
    return {int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name))}


def _end(run: RunRecords) -> Iterator[Event]:
    """How the last job ended, where `jobs.jsonl` does not tell it (yet)."""
    if run.torn:
        yield Event(
            run.last_step, "torn line", "the metrics' last line: a job was killed, or is writing it"
        )
    outcome = run.outcome
    told = bool(run.journal) and run.journal[-1]["event"] == END
    if outcome is not None and (outcome.kind == FAILED or not told):
        yield _ended(run.last_step, outcome.kind, outcome.reason)
