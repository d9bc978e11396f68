"""What job scripts ask: quick tests, without a scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.command_line.run import run_cli
from megatron_bert.config.schema import Config
from megatron_bert.errors import ConfigError, DataError, UserError
from megatron_bert.jobs import going_on
from megatron_bert.jobs.__main__ import main
from megatron_bert.jobs.going_on import ANY, HOLD, Next, announce, judge, take_up
from megatron_bert.jobs.layout import fitting_layout, layout_keys
from megatron_bert.run.directory import (
    FAILED,
    FINISHED,
    STOPPED,
    RunDirectory,
    record_failure,
)

TREE = """\
model: {num_layers: 8, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 8,
        num_query_groups: 1, max_position_embeddings: 64}
data: {tokenizer: t.model, train: [{prefix: train}]}
curriculum: [{seq_length: 64, steps: 10}]
batch: {global_size: 64}
parallel: {tensor: 2, pipeline: 4}
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(TREE)
    return path


def config(**parallel: Any) -> Config:
    return Config.model_validate(
        {
            "model": {
                "num_layers": 8,
                "hidden_size": 64,
                "ffn_hidden_size": 128,
                "num_attention_heads": 8,
                "num_query_groups": 1,
                "max_position_embeddings": 64,
            },
            "data": {"tokenizer": "t.model", "train": [{"prefix": "train"}]},
            "curriculum": [{"seq_length": 64, "steps": 10}],
            "batch": {"global_size": 64},
            "parallel": parallel,
        }
    )


def save(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("parallel", "ranks", "keys"),
    [
        ({"tensor": 2, "pipeline": 4}, 16, []),
        # Eight ranks hold one copy; twice as many, two; half as many, none.
        ({"tensor": 2, "pipeline": 4}, 8, []),
        ({"tensor": 2, "pipeline": 4}, 4, ["parallel.tensor=1"]),
        ({"tensor": 8}, 12, ["parallel.tensor=4"]),
        ({"replicate": 4}, 6, ["parallel.replicate=3"]),
        ({}, 5, []),
    ],
)
def test_what_fits_is_kept_and_data_parallelism_fills_the_rest(
    parallel: dict[str, int], ranks: int, keys: list[str]
) -> None:
    asked = config(**parallel)
    assert layout_keys(asked, fitting_layout(asked, ranks)) == keys


def test_a_job_that_chooses_its_layout_is_given_none() -> None:
    # What the section says beside `auto` counts for nothing: it neither fits nor has to.
    parallel: dict[str, Any] = {"layout": "auto", "tensor": 2, "pipeline": 4}
    # 128 ranks for 64 rows a step: not by data parallelism alone, but there are layouts.
    for ranks in (3, 128):
        asked = config(**parallel)
        assert layout_keys(asked, fitting_layout(asked, ranks)) == []


def test_ranks_that_have_no_layout_are_refused_with_numbers_that_have_one() -> None:
    with pytest.raises(ConfigError, match="no layout of 67 ranks works; start"):
        fitting_layout(config(), 67)


def test_a_finished_run_has_no_other_job(tmp_path: Path) -> None:
    (tmp_path / FINISHED).write_text("{}")
    assert judge(tmp_path, 1).next is Next.FINISHED


def test_a_job_that_got_on_is_followed_however_it_ended(tmp_path: Path) -> None:
    for number, kind in enumerate((STOPPED, None, "FAILED"), start=1):
        save(tmp_path, 10 * number)
        for path in (tmp_path / STOPPED, tmp_path / "FAILED"):
            path.unlink(missing_ok=True)
        if kind is not None:
            (tmp_path / kind).write_text(json.dumps({"reason": f"because of {number}"}))
        verdict = judge(tmp_path, 1)
        assert verdict.next is Next.AGAIN
        assert f"step {10 * number}" in verdict.reason
        assert (f"because of {number}" in verdict.reason) == (kind is not None)


def test_jobs_without_a_newer_checkpoint_are_counted_and_end_the_run(tmp_path: Path) -> None:
    record_failure(tmp_path, 0, RuntimeError("no room"))
    assert [judge(tmp_path, 3).next for _ in range(3)] == [Next.AGAIN, Next.AGAIN, Next.GIVE_UP]
    verdict = judge(tmp_path, 3)
    assert verdict.next is Next.GIVE_UP
    assert "no room" in verdict.reason
    assert "4 job(s) in a row" in verdict.reason


def test_a_newer_checkpoint_and_a_person_clear_the_count(tmp_path: Path) -> None:
    judge(tmp_path, 3)
    judge(tmp_path, 3)
    save(tmp_path, 17)
    assert [judge(tmp_path, 2).next for _ in range(3)] == [Next.AGAIN, Next.AGAIN, Next.GIVE_UP]
    take_up(tmp_path, "71", 3)
    # The checkpoint of step 17 was there before.
    assert [judge(tmp_path, 2).next for _ in range(2)] == [Next.AGAIN, Next.GIVE_UP]


def test_jobs_of_a_few_steps_each_are_no_progress(tmp_path: Path) -> None:
    verdicts = []
    for step in (1, 2, 3):
        save(tmp_path, step)
        (tmp_path / STOPPED).write_text(json.dumps({"reason": "run.deadline"}))
        verdicts.append(judge(tmp_path, 3))
    assert [verdict.next for verdict in verdicts] == [Next.AGAIN, Next.AGAIN, Next.GIVE_UP]
    assert "3 job(s) in a row brought no checkpoint 10 steps newer" in verdicts[-1].reason


def test_what_a_person_has_to_mend_is_not_tried_again(tmp_path: Path) -> None:
    save(tmp_path, 100)
    record_failure(tmp_path, 0, DataError("data/x.bin: no such file"))
    verdict = judge(tmp_path, 3)
    assert verdict.next is Next.REFUSED
    assert "data/x.bin: no such file" in verdict.reason


@pytest.mark.parametrize("trains", [False, True])
def test_a_finished_run_whose_next_job_is_refused_stays_finished(
    tmp_path: Path, trains: bool
) -> None:
    with RunDirectory(tmp_path) as run:
        run.journal.start(step=0, ranks=1)
        run.finish({"step": 40})
    before = (tmp_path / FINISHED).read_bytes()
    take_up(tmp_path, "71", 3)
    if trains:
        with RunDirectory(tmp_path) as run:
            run.journal.start(step=40, ranks=1)
    record_failure(tmp_path, 0, DataError("optimizer.lr: may change only in a new run"))
    assert judge(tmp_path, 3).next is Next.REFUSED
    assert (tmp_path / FAILED).exists() == trains
    assert trains or (tmp_path / FINISHED).read_bytes() == before


def test_a_job_that_follows_goes_on_counting(tmp_path: Path) -> None:
    take_up(tmp_path, "71", 3)
    judge(tmp_path, 3)
    take_up(tmp_path, "71", 3)
    judge(tmp_path, 3)
    announce(tmp_path, "72")
    take_up(tmp_path, "72", 3)
    assert judge(tmp_path, 3).next is Next.GIVE_UP
    take_up(tmp_path, "73", 3)
    assert judge(tmp_path, 3).next is Next.AGAIN


def test_a_copy_whose_number_is_not_known_yet_goes_on_counting(tmp_path: Path) -> None:
    take_up(tmp_path, "71", 3)
    judge(tmp_path, 2)
    announce(tmp_path, ANY)
    take_up(tmp_path, "72", 3)
    assert judge(tmp_path, 2).next is Next.GIVE_UP
    # The one after it is a person's.
    take_up(tmp_path, "73", 3)
    assert judge(tmp_path, 2).next is Next.AGAIN


def test_a_job_that_the_scheduler_queues_again_unjudged_is_counted_and_refused_at_the_limit(
    tmp_path: Path,
) -> None:
    take_up(tmp_path, "71", 2)
    take_up(tmp_path, "71", 2)
    with pytest.raises(UserError, match=r"2 job\(s\) in a row brought no checkpoint"):
        take_up(tmp_path, "71", 2)
    # A person's job begins to count anew.
    take_up(tmp_path, "72", 1)


def test_jobs_queued_again_after_a_newer_checkpoint_go_on(tmp_path: Path) -> None:
    for number in range(1, 6):
        take_up(tmp_path, "71", 1)
        save(tmp_path, 10 * number)


def test_a_judged_job_is_not_counted_again(tmp_path: Path) -> None:
    take_up(tmp_path, "71", 2)
    judge(tmp_path, 2)
    take_up(tmp_path, "71", 2)
    assert judge(tmp_path, 3).next is Next.AGAIN


def test_a_second_job_of_a_live_run_is_refused_and_changes_nothing(
    config_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(going_on, "LOCK_SECONDS", 0.0)
    run_dir = config_path.with_name("run")
    begin = ["begin", "--tries=3", "--config", str(config_path), "--ranks=8"]
    main([*begin, "--job=71", "--", f"run.dir={run_dir}"])
    judge(run_dir, 3)
    (run_dir / FINISHED).write_text("{}")
    with RunDirectory(run_dir):
        before = contents(run_dir)
        with pytest.raises(SystemExit) as left:
            run_cli(lambda: main([*begin, "--job=72", "--", f"run.dir={run_dir}"]))
        assert contents(run_dir) == before
    assert left.value.code == 2
    assert "is in use by a live run" in capsys.readouterr().err


def test_a_job_waits_for_the_ranks_of_the_one_before_and_leaves_the_lock_to_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = RunDirectory(tmp_path)
    monkeypatch.setattr(going_on.time, "sleep", lambda _: held.close())
    take_up(tmp_path, "71", 3)
    RunDirectory(tmp_path).close()


@pytest.mark.parametrize("kind", [FINISHED, STOPPED, FAILED])
def test_a_job_that_dies_at_once_has_not_ended_as_the_one_before(tmp_path: Path, kind: str) -> None:
    (tmp_path / kind).write_text(json.dumps({"reason": "an older one"}))
    take_up(tmp_path, "71", 3)
    verdict = judge(tmp_path, 2)
    assert verdict.next is Next.AGAIN
    assert verdict.reason == "the job was killed, or never began to train; no checkpoint"


def test_a_count_that_cannot_be_read_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tries.json").write_text("[1")
    assert judge(tmp_path, 2).next is Next.AGAIN


def test_a_file_holds_the_run(tmp_path: Path) -> None:
    (tmp_path / HOLD).touch()
    verdict = judge(tmp_path, 3)
    assert verdict.next is Next.HELD
    assert str(tmp_path / HOLD) in verdict.reason


def test_a_held_run_does_not_begin_and_nothing_changes(tmp_path: Path) -> None:
    (tmp_path / HOLD).touch()
    (tmp_path / STOPPED).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"HOLD: this file holds the run; remove it to go on"):
        take_up(tmp_path, "71", 3)
    assert contents(tmp_path) == before


def test_begin_prints_the_run_directory_and_the_keys_to_add(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = config_path.with_name("some where")
    arguments = ["begin", "--job=1", "--tries=3", "--config", str(config_path), "--ranks=4"]
    main([*arguments, "--", f"run.dir={run_dir}"])
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(run_dir), "parallel.tensor=1"]
    assert "does not fit 4 ranks; taking parallel.tensor=1" in told.err


def test_begin_refuses_what_cannot_be_trained(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_cli(
            lambda: main(
                [
                    "begin",
                    "--job=1",
                    "--tries=3",
                    "--config",
                    str(config_path),
                    "--ranks=8",
                    "--",
                    "optimizer.lt=1",
                ]
            )
        )
    assert left.value.code == 2
    assert "optimizer.lt" in capsys.readouterr().err


def test_judge_prints_one_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["judge", "--tries", "2", str(tmp_path)])
    told = capsys.readouterr()
    assert told.out == "again\n"
    assert "killed, or never began to train; no checkpoint" in told.err


@pytest.mark.parametrize("command", [["judge", "--tries", "3"], ["announce", "--job", "7"]])
def test_a_run_directory_that_is_not_there_is_refused_and_not_made(
    tmp_path: Path, command: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"run directory .*none: there is none; give that of"):
        main([*command, str(tmp_path / "none")])
    assert list(tmp_path.iterdir()) == []
