from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bert.report.events import events_of, moments
from megatron_bert.report.records import RunRecords, job_in_words
from megatron_bert.report.settings import differences
from tests.report.made_runs import make_run

LEFT_OUT = ("stage", "loss spike")
SAVED = "saved in 12.3 s, 3.9 GB; training stood still for 0.2 s"


def told(run: Path, kind: str) -> list[tuple[int, str]]:
    events = events_of(RunRecords.read(run))
    assert [event.step for event in events] == sorted(event.step for event in events)
    return [(event.step, event.text) for event in events if event.kind == kind]


def test_skipped_steps_in_a_row_are_one_event_with_their_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20, skipped=(5, 6, 7, 9))
    assert told(run, "update skipped") == [
        (5, "loss or gradient not finite to step 7, rows 4,096 to 7,167"),
        (9, "loss or gradient not finite, rows 8,192 to 9,215"),
    ]
    assert told(run, "loss spike") == [(10, "far above the losses before it, rows 9,216 to 10,239")]


def test_a_run_that_goes_wrong_for_long_does_not_fill_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 300, skipped=range(1, 300, 2))
    events = told(run, "update skipped")
    assert len(events) == 101
    assert events[50] == (101, "50 more, the last of them at step 199")
    assert [events[0][0], events[49][0], events[51][0], events[-1][0]] == [1, 99, 201, 299]


def test_jobs_checkpoints_and_the_end_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 30)
    for name in ("step_00000010", "step_00000030", "step_00000020.tmp-1", "latest"):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "metrics.before-1.jsonl").touch()
    assert told(run, "start") == [(0, "job 71, 4 ranks from step 1, 2026-01-01")]
    assert [step for step, _ in told(run, "restart")] == [10, 20]
    assert [step for step, _ in told(run, "checkpoint")] == [10, 30]
    assert [step for step, _ in told(run, "set aside")] == [0]
    assert told(run, "finished") == [(30, "all steps taken")]


def test_a_key_without_a_value_differs_from_none_that_is_absent() -> None:
    one = "a: {b: 1, c: null}\nd: [x, y]\nrun: {dir: one}\n"
    other = "a: {b: 2, e: true}\nd: [x]\nrun: {dir: other}\n"
    assert differences([one, other]) == {"a.b": ["1", "2"], "d.1": ["y", "—"], "a.e": ["—", "true"]}
    assert differences([one, None]).keys() == {"a.b", "d.0", "d.1"}
    assert differences([one, "not: [readable"]).keys() == {"a.b", "d.0", "d.1"}


def write_journal(run: Path, *lines: dict[str, object]) -> None:
    (run / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(step: int) -> dict[str, object]:
    return {"event": "start", "job": None, "step": step, "ranks": 4, "nodes": 1, "time": "today"}


def save(step: int) -> dict[str, object]:
    numbers = {"seconds": 12.34, "blocked_seconds": 0.21, "bytes": 3_900_000_000}
    return {"event": "save", "step": step, **numbers}


def test_a_run_that_went_back_is_told_in_the_order_in_which_it_happened(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 30, skipped=(12, 22))
    write_journal(
        run,
        start(0),
        save(10),
        save(20),
        {"event": "end", "outcome": "KILLED", "step": 25, "reason": "without a word"},
        # The checkpoint of step 20 was damaged.
        start(10),
        save(20),
        {"event": "save failed", "step": 25, "reason": "no room"},
    )
    (run / "checkpoints" / "step_00000020").mkdir(parents=True)
    events = [event for event in events_of(RunRecords.read(run)) if event.kind not in LEFT_OUT]
    assert [(event.step, event.kind, event.text) for event in events] == [
        (0, "start", "4 ranks from step 1, today"),
        (10, "checkpoint", f"{SAVED}; removed since"),
        (20, "checkpoint", f"{SAVED}; removed since"),
        (25, "killed", "without a word"),
        (10, "restart", "4 ranks from step 11, today"),
        (12, "update skipped", "loss or gradient not finite, rows 11,264 to 12,287"),
        (20, "checkpoint", SAVED),
        (22, "update skipped", "loss or gradient not finite, rows 21,504 to 22,527"),
        (25, "save failed", "no room"),
        (30, "finished", "all steps taken"),
    ]
    assert [job["step"] for job in RunRecords.read(run).jobs] == [0, 10]


@pytest.mark.parametrize("kind", ["FAILED", "STOPPED", "KILLED"])
def test_only_a_run_that_finished_took_all_steps(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", 30)
    write_journal(run, start(0), {"event": "end", "outcome": kind, "step": 30})
    assert told(run, kind.lower()) == [(30, "no reason was given")]
    (run / "FINISHED").rename(run / "FAILED")
    write_journal(run, start(0))
    assert told(run, "failed") == [(30, "no reason was given")]


def test_jobs_whose_steps_were_taken_anew_are_not_marked_in_the_charts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 30)
    write_journal(run, *map(start, (0, 12, 20, 0, 12, 12, 30)))
    assert [job["step"] for job in RunRecords.read(run).jobs] == [0, 12]


def test_of_many_saves_the_first_and_last_are_told_and_those_still_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 300)
    write_journal(run, start(0), *(save(step) for step in range(1, 300)))
    for step in (100, 200, 299):
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    saves = told(run, "checkpoint")
    assert [step for step, text in saves if text == SAVED] == [100, 200, 299]
    assert saves[50] == (51, "197 more, the last of them at step 249")
    assert [step for step, _ in saves] == [*range(1, 52), 100, 200, *range(250, 300)]


def test_of_many_saves_that_are_all_there_the_newest_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 300)
    for step in range(1, 300):
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    assert [step for step, _ in told(run, "checkpoint")] == [*range(1, 52), *range(200, 300)]


def test_of_many_jobs_the_last_ones_and_their_ends_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 300)
    lines: list[dict[str, object]] = []
    for step in range(0, 300, 2):
        end = {"event": "end", "outcome": "STOPPED", "step": step + 2, "reason": f"job {step // 2}"}
        lines += [start(step), end]
    write_journal(run, *lines)
    assert told(run, "restart")[-1] == (298, "4 ranks from step 299, today")
    assert told(run, "stopped")[-1] == (300, "job 149")
    assert len(told(run, "stopped")) == 101
    records = RunRecords.read(run)
    jobs = records.facts()["jobs"].split("; ")
    assert (len(jobs), jobs[0], jobs[5]) == (11, "4 ranks from step 1", "140 more")
    assert jobs[-1] == "4 ranks from step 299"
    marks = [moment.row for moment in moments(records) if moment.kind == "job"]
    assert (len(marks), marks[0], marks[-1]) == (100, 2, 298)


@pytest.mark.parametrize(
    ("ranks", "nodes", "size"), [(1, 1, "1 rank"), (8, 2, "8 ranks on 2 nodes")]
)
def test_a_jobs_size_is_told(ranks: int, nodes: int, size: str) -> None:
    job = {"job": None, "step": 0, "ranks": ranks, "nodes": nodes}
    assert job_in_words(job) == f"{size} from step 1"
