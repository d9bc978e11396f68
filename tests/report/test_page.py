from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bert.command_line.run import run_cli
from megatron_bert.config.yaml_text import format_document
from megatron_bert.data.token_kinds import TOKEN_KINDS
from megatron_bert.errors import UserError
from megatron_bert.report.curves import AXES
from megatron_bert.report.page import page_of
from megatron_bert.report.records import RunRecords, names_of
from megatron_bert.report.timeline import Timeline, timeline_of
from tests.report.made_runs import make_run
from tools import report as tool

PIPELINE = {"pipeline": 2, "pipeline_schedule": "1f1b", "virtual_stages": 2}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: tool.main(arguments))
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecords]:
    folder = tmp_path_factory.mktemp("runs")
    settings = [{"optimizer": {"lr": lr}, "run": {"dir": str(lr)}} for lr in (1e-4, 3e-4)]
    return [
        RunRecords.read(make_run(folder / "a" / "run", 60, texts=("wiki", "law"))),
        RunRecords.read(make_run(folder / "b" / "run", 40, settings=settings[0])),
        RunRecords.read(make_run(folder / "other", 40, settings=settings[1])),
    ]


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: list[RunRecords]) -> None:
    names = ["a/run", "b/run", "other"]
    assert names_of(runs) == names
    page = page_of(runs)
    assert f"<title>{', '.join(names)}</title>" in page
    key = re.findall(
        r'<span class="key"><svg viewBox="0 0 24 8" class="(c\d)">.*?</svg>(.*?)<', page
    )
    assert [found for found in key if found[1] in names] == list(
        zip(("c0", "c1", "c2"), names, strict=True)
    )


def test_each_chart_has_a_curve_of_each_run_over_each_axis(runs: list[RunRecords]) -> None:
    page = page_of(runs)
    for title in (
        "Loss", "Gradient norm", "MFU", "Peak memory", "Throughput",
        "Time of steps, evaluations and saves",
    ):  # fmt: skip
        figure = page.split(f"<b>{title}</b>")[1].split("</figure>")[0]
        for axis in AXES:
            chart = figure.split(f'<svg class="chart by-{axis}"')[1].split("</svg>")[0]
            lines = re.findall(r'class="line r(\d)[^"]*" data-run="(\d)".*? d="(M[^"]+)"', chart)
            assert {int(run) for run, _, _ in lines} == {0, 1, 2}, (title, axis)
            assert all(first == second for first, second, _ in lines)


def test_every_kind_of_a_run_is_told_apart_in_chart_and_legend(runs: list[RunRecords]) -> None:
    page = page_of(runs[1:2])
    figure = page.split("<b>Masked accuracy by characters: wiki</b>")[1].split("</figure>")[0]
    drawn = figure.split('<svg class="chart by-step"')[1].split("</svg>")[0]
    lines = re.findall(r'class="line r0 (c\d d\d)" data-run="0" data-name="(\w+)"', drawn)
    key = re.findall(r'class="(c\d)"><path class="line (d\d)".*?</svg>\s*(\w+)</span>', figure)
    assert len({look for look, _ in lines}) == len(lines) == len(TOKEN_KINDS) - 1
    assert [(f"{colour} {dash}", name) for colour, dash, name in key] == lines


def test_many_kinds_of_many_texts_do_not_fill_the_page(tmp_path: Path) -> None:
    run = RunRecords.read(
        make_run(tmp_path / "run", 600, texts=("wiki", "law", "news"), evaluations=600)
    )
    for line in run.evaluations:
        assert len(line["valid"]) == 3
    without = [
        line
        | {
            "valid": {
                text: {name: score for name, score in scores.items() if "_by_" not in name}
                for text, scores in line["valid"].items()
            }
        }
        for line in run.evaluations
    ]
    page, plain = page_of([run]), page_of([replace(run, evaluations=without)])
    assert page.count("<figure>") == plain.count("<figure>") + 6
    assert len(page) < 1.5 * len(plain)


def test_the_keys_that_differ_are_told_and_no_others(runs: list[RunRecords]) -> None:
    differing = page_of(runs[1:]).split("what differs</h2>")[1].split("<details>")[0]
    assert re.findall(r"<th>(.*?)</th>", differing) == ["", "run", "other", "optimizer.<wbr>lr"]
    assert re.findall(r"<td>(.*?)</td>", differing) == ["0.0001", "0.0003"]


def test_the_page_is_written_into_the_first_run_and_needs_no_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folders = [make_run(tmp_path / name, 8) for name in "ab"]
    tool.main([str(folder) for folder in folders])
    assert [path.parent.name for path in tmp_path.rglob("report.html")] == ["a"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("run directory")] == [
        str(folder) for folder in folders
    ]


def test_a_run_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    run = RunRecords.read(make_run(tmp_path / "run", 4))
    with pytest.raises(UserError, match=r"run: given twice"):
        page_of([run, run])


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
def test_a_pipelines_timeline_has_every_computation(tmp_path: Path, schedule: str) -> None:
    settings = {"parallel": {**PIPELINE, "pipeline_schedule": schedule}}
    page = page_of([RunRecords.read(make_run(tmp_path / "run", 4, settings=settings))])
    drawing = page.split(f"{schedule} over 2 ranks, 4 micro-batches")[1].split("</figure>")[0]
    boxes = drawing.split('aria-label="timeline')[1].count("<rect")
    assert (
        boxes == {"1f1b": 2 * 4 * 2, "interleaved": 4 * 4 * 2, "zero_bubble": 4 * 4 * 3}[schedule]
    )


@pytest.mark.parametrize(
    ("schedule", "virtual", "drawn"),
    [("1f1b", 1, 17), ("interleaved", 2, 12), ("zero_bubble", 2, 10)],
)
def test_the_timeline_of_many_ranks_stays_small_and_says_so(
    schedule: str, virtual: int, drawn: int
) -> None:
    def timeline(ranks: int) -> Timeline:
        parallel = {
            "pipeline": ranks, "pipeline_schedule": schedule, "virtual_stages": virtual
        }  # fmt: skip
        found = timeline_of(format_document({"parallel": parallel}))
        assert found is not None
        return found

    many = timeline(20)
    assert f"{schedule} over 20 ranks, 40 micro-batches: ranks wait " in many.text
    assert many.text.endswith(f"the less. Drawn is the same schedule over {drawn} ranks")
    assert many.svg == timeline(drawn).svg
    assert "Drawn" not in timeline(drawn).text
    assert 600 < many.svg.count("<rect") <= 1200
    assert len(many.svg) < 100_000


@pytest.mark.parametrize(
    "parallel",
    [
        {**PIPELINE, "pipeline": 1},
        {**PIPELINE, "pipeline": "two"},
        {**PIPELINE, "pipeline_schedule": "<script>"},
        {},
    ],
)
def test_without_a_pipeline_that_is_known_there_is_no_timeline(
    tmp_path: Path, parallel: dict[str, object]
) -> None:
    run = RunRecords.read(make_run(tmp_path / "run", 4, settings={"parallel": parallel}))
    assert "timeline of the pipeline" not in page_of([run])


def test_a_line_that_a_killed_job_left_half_written_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss"')
    run = RunRecords.read(folder)
    assert run.last_step == 20
    assert "<td>torn line</td>" in page_of([run])


def test_lines_without_tokens_are_gaps_of_the_curves_over_tokens(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 8)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in (records[0], records[-1]):
        record.pop("tokens", None)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    run = RunRecords.read(folder)
    assert int(run.facts()["token slots"].replace(",", "")) > 0
    assert not re.search(r' d="[^"]*nan', page_of([run]))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{broken\n", r"metrics\.jsonl line 2: not a record; remove the line"),
        ('{"loss": 1.0}\n', r"metrics\.jsonl line 2: no number `step`"),
        ('{"step": 2, "stage": 0, "loss": 1.0}\n', r"line 2: no number `seq_length`"),
        ('{"step": 2, "valid_loss": 1.0}\n', r"line 2: no number `valid_accuracy`"),
    ],
)
def test_damage_in_the_middle_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, error: str
) -> None:
    folder = make_run(tmp_path / "run", 4)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[1] = line
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert re.search(error, refusal([str(folder)], capsys))
    assert not (folder / "report.html").exists()


def test_a_run_directory_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_run(tmp_path / "run", 4)
    error = refusal([str(good), str(tmp_path / "rnu")], capsys)
    assert "rnu: no such run directory; give the run.dir of a run" in error
    assert not (good / "report.html").exists()


def test_a_browser_may_load_nothing_and_run_no_other_script(runs: list[RunRecords]) -> None:
    (policy,) = re.findall(r'Security-Policy" content="([^"]*)"', page_of(runs[:1]))
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
