from __future__ import annotations

from pathlib import Path

from megatron_bert.report.events import events_of
from megatron_bert.report.records import RunRecords
from megatron_bert.report.settings import differences
from tests.report.made_runs import make_run


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
    assert events[-1][1] == "50 more, the last one at step 299"


def test_jobs_checkpoints_and_the_end_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 30)
    for name in ("step_00000010", "step_00000030", "step_00000020.tmp-1", "latest"):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "metrics.before-1.jsonl").touch()
    assert told(run, "start") == [(0, "job 71, 4 rank(s) from step 1, 2026-01-01")]
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
