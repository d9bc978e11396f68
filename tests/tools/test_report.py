from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert.command_line.run import run_cli
from megatron_bert.errors import UserError
from megatron_bert.report.page import write_page
from megatron_bert.report.picture import draw_curves, write_picture
from megatron_bert.report.records import RunRecords
from megatron_bert.run.directory import RunDirectory, record_failure
from megatron_bert.run.metrics import MetricsFile
from tests.deadlines import DEADLINE_SECONDS
from tools import report as tool

pytest.importorskip("matplotlib")

LENGTHS = {1: 1234, 7: 5678}


def write_run(
    folder: Path, steps: int = 12, *, evaluations: bool = True, nan_at: int | None = None
) -> Path:
    folder.mkdir()
    file = MetricsFile(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        stage, length = (0, LENGTHS[1]) if step < 7 else (1, LENGTHS[7])
        loss = math.nan if step == nan_at else 10.0 - step / 2
        record = {"step": step, "stage": stage, "seq_length": length, "loss": loss}
        file.write({**record, "tokens": 1000 * step, "lr": 1e-3 / step, "step_seconds": 10.0})
        if evaluations and step % 6 == 0:
            valid = {"step": step, "valid_loss": 7.25, "valid_accuracy": 0.125}
            file.write({**valid, "valid_seq_length": length})
    file.close()
    return folder


def test_a_runs_facts_are_those_of_its_metrics(tmp_path: Path) -> None:
    run = RunRecords.read(write_run(tmp_path / "run"))
    assert run.facts() == {
        "run directory": str(tmp_path / "run"),
        "state": "running, or killed",
        "steps": "12 of length 1234 from step 1, length 5678 from step 7",
        "token slots": "12,000",
        "time in steps": "2 min",
        "loss": "9.500 at the first step, 6.250 mean of the last 10",
        "held-out loss": "7.250, accuracy 0.125 (length 5678)",
    }


def test_a_live_run_is_told_from_one_that_was_killed_and_not_disturbed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with RunDirectory(folder):
        before = (folder / "run.lock").read_text()
        assert RunRecords.read(folder).facts()["state"] == "running"
        assert (folder / "run.lock").read_text() == before
    die = (
        "import os, sys; from pathlib import Path; "
        "from megatron_bert.run.directory import RunDirectory; "
        "run = RunDirectory(Path(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", die, folder], check=False, timeout=DEADLINE_SECONDS)
    assert RunRecords.read(folder).facts()["state"] == "killed"


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        # Another process has got the number of the one that held the lock.
        ({"ticks": 1}, "killed"),
        # The host's clock was set forward since then.
        ({"started": "2020-01-01T00:00:00+00:00"}, "running"),
        ({"host": "another"}, "running, or killed"),
        ({"processes": "of another container"}, "running, or killed"),
        ({"pid": None}, "running, or killed"),
    ],
)
def test_a_run_is_called_killed_only_where_its_process_can_be_looked_for(
    tmp_path: Path, changes: dict[str, object], state: str
) -> None:
    folder = write_run(tmp_path / "run")
    RunDirectory(folder).close()
    lock = folder / "run.lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | changes))
    assert RunRecords.read(folder).facts()["state"] == state


def test_jobs_are_told_with_the_step_they_began_at(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    jobs = [
        {"job": "71", "step": 0, "ranks": 8, "nodes": 2},
        {"job": None, "step": 6, "ranks": 4, "nodes": 1},
        # The run was finished; this one took no step.
        {"job": None, "step": 12, "ranks": 1, "nodes": 1},
    ]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    run = RunRecords.read(folder)
    assert run.facts()["jobs"] == ("job 71, 8 ranks on 2 nodes from step 1; 4 ranks from step 7")
    lower = draw_curves([run]).axes[1]
    dashed = [line for line in lower.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [7]


def test_metrics_that_were_set_aside_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for number in (1, 2):
        (folder / f"metrics.before-{number}.jsonl").touch()
    facts = RunRecords.read(folder).facts()
    assert facts["set aside"] == "metrics.before-1.jsonl, metrics.before-2.jsonl"


def test_stages_of_one_length_are_told_apart(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        file.write({"step": step, "stage": (step - 1) // 2, "seq_length": 512, "loss": 1.0})
    file.close()
    assert RunRecords.read(tmp_path).stage_starts() == [(1, 512), (3, 512), (5, 512)]


def test_a_run_without_evaluations_has_no_held_out_loss_and_can_be_drawn(tmp_path: Path) -> None:
    run = RunRecords.read(write_run(tmp_path / "run", evaluations=False))
    assert "held-out loss" not in run.facts()
    write_page([run], tmp_path / "page.html")
    assert "held out" not in (tmp_path / "page.html").read_text("utf-8")


def test_the_state_is_how_the_run_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with RunDirectory(folder) as directory:
        directory.finish({"step": 12})
        assert RunRecords.read(folder).facts()["state"] == "finished"
        directory.stop({"reason": "SIGTERM"})
        assert RunRecords.read(folder).facts()["state"] == "stopped: SIGTERM"
        directory.start()
        record_failure(folder, 0, ValueError("the disk is full"))
        assert RunRecords.read(folder).facts()["state"] == "failed: the disk is full"


@pytest.mark.parametrize("steps", [1, 12, 1000])
def test_the_picture_marks_every_stage_with_its_length(tmp_path: Path, steps: int) -> None:
    run = RunRecords.read(write_run(tmp_path / "run", steps))
    write_picture([run], tmp_path / "curves.svg")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "curves.svg").read_text("utf-8"))
    for first_step, length in LENGTHS.items():
        assert (str(length) in texts) == (steps >= first_step)


def test_a_loss_that_is_no_number_is_a_gap_in_the_curve(tmp_path: Path) -> None:
    run = RunRecords.read(write_run(tmp_path / "run", nan_at=5))
    write_page([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    loss = re.search(r'<path class="line [^>]* data-name="training" d="([^"]*)"', page)
    assert loss is not None
    assert (loss[1].count("M"), "nan" in loss[1]) == (2, False)


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("run: {seed: 7}\n")
    write_page([RunRecords.read(folder)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<svg") == page.count("</svg>") > 1
    assert page.count("<!DOCTYPE") == 1
    assert "<?xml" not in page
    assert "run: {seed: 7}" in page
    targets = re.findall(r"""\b(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert [target for target in targets if not target.startswith("#")] == []
    assert re.findall(r"""<link|@import|url\((?!["']?#)|\bfetch\b|XMLHttp""", page) == []
    assert page.count("<script") == 1


def test_what_a_user_wrote_is_text_in_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<b>run & {rows}")
    (folder / "config.yaml").write_text("note: </pre><script>alert('猫')</script> {title}\n")
    (folder / "FAILED").write_text(json.dumps({"reason": "<i>no</i>"}))
    write_page([RunRecords.read(folder)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    for tag in ("<b>run", "<i>", "<script>alert"):
        assert tag not in page
    assert "<title>&lt;b&gt;run &amp; {rows}</title>" in page
    assert "&lt;/pre&gt;&lt;script&gt;alert(&#x27;猫&#x27;)&lt;/script&gt; {title}" in page


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = RunRecords.read(write_run(tmp_path / "run"))
    for name in ("first", "second"):
        write_picture([run], tmp_path / f"{name}.svg")
        write_page([run], tmp_path / f"{name}.html")
    for ending in ("svg", "html"):
        first = (tmp_path / f"first.{ending}").read_bytes()
        assert first == (tmp_path / f"second.{ending}").read_bytes()


@pytest.mark.parametrize("name", ["curves.pdf", "curves", "curves.SVG"])
def test_a_picture_of_another_kind_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str
) -> None:
    folder = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"ends in \.svg or \.png"):
        tool.main([str(folder), "--picture", str(tmp_path / name)])
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]


def test_a_page_or_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    run = RunRecords.read(write_run(tmp_path / "run"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*page\.html: .*name another file"):
        write_page([run], tmp_path / "file" / "page.html")
    with pytest.raises(UserError, match=r"cannot write .*a\.png: .*name another file"):
        write_picture([run], tmp_path / "file" / "a.png")


@pytest.mark.parametrize("name", ["page.pdf", "page", "run"])
def test_a_page_of_another_kind_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str
) -> None:
    folder = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=f"--output .*{name}: give a name that ends in .html"):
        tool.main([str(folder), "--output", str(tmp_path / name)])
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]


def test_the_tool_writes_the_page_into_the_run_directory_and_prints_the_facts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    picture = tmp_path / "curves.png"
    tool.main([str(folder), "--picture", str(picture)])
    assert (folder / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert "token slots   12,000" in lines
    assert lines[-1] == f"wrote {folder / 'report.html'}"


def test_the_page_is_written_where_output_says(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    tool.main([str(folder), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()
    assert not (folder / "report.html").exists()


def test_a_run_that_failed_before_its_first_step_says_why(tmp_path: Path) -> None:
    (tmp_path / "FAILED").write_text('{"reason": "tokenizer x is missing; give one"}')
    with pytest.raises(UserError, match="for the run failed: tokenizer x is missing; give one"):
        RunRecords.read(tmp_path)


@pytest.mark.parametrize("metrics", [None, "", '{"step": 3}\n'])
def test_a_run_without_a_recorded_step_is_refused_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metrics: str | None
) -> None:
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: tool.main([str(tmp_path)]))
    assert left.value.code == 2
    assert re.match(r"error: .*(cannot read metrics|train first)", capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()
