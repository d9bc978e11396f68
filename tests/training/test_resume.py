"""A run that is killed or stopped and taken up again is the uncut run, to the bit."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bert.checkpoint.manifest import Manifest
from megatron_bert.checkpoint.run_state import RunState
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.kernels import ComputeDevice
from megatron_bert.config.load import config_dict
from megatron_bert.config.schema import Config
from megatron_bert.data import corpora
from megatron_bert.data.corpora import OpenCorpus
from megatron_bert.data.source import RowSource, training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.topology import Topology
from megatron_bert.errors import ConfigError, UserError
from megatron_bert.model.build import build_model
from megatron_bert.parallel.sharding import local_part
from megatron_bert.run.directory import RunDirectory
from megatron_bert.run.metrics import read
from megatron_bert.training import dry_run as dry_run_module
from megatron_bert.training import resume, spikes
from megatron_bert.training.dry_run import dry_run
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.resume import StartingPoint
from megatron_bert.training.state import load_state
from megatron_bert.training.trainer import Trainer
from tests.distributed_harness import run_ranks
from tests.training.runs import Stops, run_config, steps_of, train

FP8 = {"precision": {"compute": "bf16", "fp8": "current"}}
EXACT = ("loss", "grad_norm", "lr", "batch_hash", "consumed_rows", "stage", "tokens")


def _facts(lines: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[Any, ...]]:
    training = {
        ("training", step): tuple(line[key] for key in EXACT)
        for step, line in steps_of(lines).items()
    }
    evaluated = [line for line in lines if "valid_loss" in line]
    evaluations = {("evaluation", line["step"]): (line["valid_loss"],) for line in evaluated}
    assert len(evaluations) == len(evaluated), "an evaluation stands twice"
    return training | evaluations


def _check_kills(uncut: Config, killed: Config, killed_once: Config) -> None:
    expected = _facts(train(uncut))
    # Every job is killed one step later than the one before, whose checkpoints it begins from.
    for kill_in in range(1, 13):
        seen = _facts(train(killed, kill_in=kill_in))
        what = f"killed in step {kill_in}"
        assert seen.items() <= expected.items(), what
        assert all(step < kill_in for _, step in seen), what
        # The line of the last step is written in the next one.
        assert seen.keys() >= {fact for fact in expected if fact[1] < kill_in - 1}, what
    assert _facts(train(killed)) == expected
    train(killed_once, kill_in=5)
    assert _facts(train(killed_once)) == expected


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(1, {}, id="one-rank"),
        pytest.param(2, {}, id="data-parallel"),
        *(
            pytest.param(ranks, changes, id=name, marks=pytest.mark.slow)
            for name, ranks, changes in (
                ("bf16", 1, {"precision": {"compute": "bf16"}, "mlm": {"unit": "whole_word"}}),
                ("fp8", 2, {**FP8, "model": {"num_attention_heads": 2}}),
                ("tensor-parallel", 2, {"parallel": {"tensor": 2}}),
                ("muon", 2, {"optimizer": {"name": "muon"}, "precision": {"reduce": "bf16"}}),
            )
        ),
    ],
)
def test_a_run_killed_in_any_step_resumes_with_the_same_bits(
    tiny_run: Callable[..., Config], world_size: int, changes: dict[str, Any]
) -> None:
    configs = [tiny_run(name, **changes) for name in ("uncut", "killed", "killed-once")]
    run_ranks(world_size, _check_kills, *configs)


def _check_kill_after_evaluation(uncut: Config, killed: Config) -> None:
    expected = _facts(train(uncut))
    train(killed, kill_in=6)
    assert _facts(train(killed)) == expected
    # A finished run is loaded too, and has nothing to do.
    assert _facts(train(killed)) == expected


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_of_a_step_that_was_evaluated_holds_the_unrounded_weights(
    tiny_run: Callable[..., Config], world_size: int
) -> None:
    changes = {
        "precision": {"compute": "bf16"},
        "checkpoint": {"interval": 4},
        "eval": {"interval": 4, "batches": 1},
    }
    configs = [tiny_run(name, **changes) for name in ("uncut", "killed")]
    run_ranks(world_size, _check_kill_after_evaluation, *configs)


def test_the_runs_of_these_tests_cross_stages_and_epochs(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    (line,) = training_source(config, Tokenizer.load(Path(config.data.tokenizer))).describe()
    assert float(line.split("read ")[1].split()[0]) > 1.5
    assert len(config.curriculum) == 2


def _check_stop(uncut: Config, stopped: Config) -> None:
    expected = _facts(train(uncut))
    lines = train(stopped, stop_after=5)
    if lines:
        assert max(steps_of(lines)) == 5
        assert (stopped.run.directory / "checkpoints" / "step_00000005").is_dir()
    assert _facts(train(stopped)) == expected


def test_a_stopped_run_saves_its_step_and_goes_on(tiny_run: Callable[..., Config]) -> None:
    run_ranks(2, _check_stop, tiny_run("uncut"), tiny_run("stopped"))


def _spike_limits(config: Config, stops: Sequence[int]) -> dict[int, float]:
    """Of a run that is stopped after these steps, where nearly every loss is called a spike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "_LEAST_STEPS", 2)
        patch.setattr(spikes, "_LEAST_NATS", -100.0)
        patch.setattr(spikes, "_DEVIATIONS", -6.0)
        for step in stops:
            train(config, stop_after=step)
        lines = steps_of(train(config))
    return {step: line["spike_limit"] for step, line in lines.items() if "spike_limit" in line}


def test_a_spike_is_told_by_the_losses_of_the_jobs_before_too(
    tiny_run: Callable[..., Config],
) -> None:
    constant = {"valid": False, "schedule": {"decay": "constant", "warmup_steps": 1}}
    optimizer = {"lr": 1e-7, "min_lr": 0.0}
    uncut = tiny_run("uncut", optimizer=optimizer, **constant)
    cut = tiny_run("cut", optimizer=optimizer, **constant)
    expected = run_ranks(1, _spike_limits, uncut, ())[0]
    # The first ones after each stop, which a job that begins with no losses cannot have.
    assert expected.keys() & {5, 6}
    assert expected.keys() & {10, 11}
    assert run_ranks(1, _spike_limits, cut, (4, 9))[0] == expected


def _progress_lines(config: Config, stop_after: int) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    progress = logging.getLogger("megatron_bert.training.progress")
    progress.addHandler(handler)
    progress.setLevel(logging.INFO)
    train(config, stop_after=stop_after)
    progress.removeHandler(handler)
    return said


def test_a_jobs_lines_tell_the_checkpoint_that_the_next_job_would_go_on_from(
    tiny_run: Callable[..., Config],
) -> None:
    config = tiny_run(valid=False, log={"interval": 1})
    (before,) = run_ranks(1, _progress_lines, config, 1)[0]
    assert before.endswith("no checkpoint yet")
    lines = run_ranks(1, _progress_lines, config, 4)[0]
    assert [line.split(" · ")[-1] for line in lines] == [
        "last checkpoint 1", "last checkpoint 1", "last checkpoint 3",
    ]  # fmt: skip


def _train_once(config: Config, stop: dict[str, int]) -> list[dict[str, Any]]:
    return train(config, **stop)


def test_another_layout_takes_a_run_up_with_the_same_rows_and_losses(
    tiny_run: Callable[..., Config],
) -> None:
    uncut = steps_of(run_ranks(1, _train_once, tiny_run("uncut"), {})[0])
    elastic = tiny_run("elastic")
    run_ranks(2, _train_once, elastic, {"stop_after": 4})
    tensor = elastic.model_copy(
        update={"parallel": elastic.parallel.model_copy(update={"tensor": 2})}
    )
    run_ranks(4, _train_once, tensor, {"stop_after": 8})
    lines = steps_of(run_ranks(3, _train_once, elastic, {})[0])
    assert list(lines) == list(uncut)
    for step, line in lines.items():
        assert line["batch_hash"] == uncut[step]["batch_hash"]
        assert line["loss"] == pytest.approx(uncut[step]["loss"], rel=1e-5)


def test_the_last_stage_can_be_lengthened_when_the_run_is_taken_up(
    tiny_run: Callable[..., Config],
) -> None:
    constant = {"schedule": {"decay": "constant", "warmup_steps": 1}}
    longer = [{"seq_length": 32, "steps": 7}, {"seq_length": 64, "steps": 8}]
    uncut = run_ranks(1, _train_once, tiny_run("long", curriculum=longer, **constant), {})[0]
    run_ranks(1, _train_once, tiny_run("run", **constant), {})
    lines = run_ranks(1, _train_once, tiny_run("run", curriculum=longer, **constant), {})[0]
    expected, found = steps_of(uncut), steps_of(lines)
    assert list(found) == list(expected)
    assert [line["loss"] for line in found.values()] == [line["loss"] for line in expected.values()]


def _refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


def test_another_learning_rate_is_refused_in_the_same_run_and_taken_in_a_new_one(
    tiny_run: Callable[..., Config],
) -> None:
    first = tiny_run("run")
    run_ranks(1, _train_once, first, {"stop_after": 4})
    before = (first.run.directory / "config.yaml").read_bytes()
    message = run_ranks(1, _refused, tiny_run("run", optimizer={"lr": 0.5}))[0]
    assert "optimizer.lr" in message
    assert (first.run.directory / "config.yaml").read_bytes() == before
    branch = tiny_run(
        "branch",
        optimizer={"lr": 2e-2},
        checkpoint={"resume": str(first.run.directory / "checkpoints" / "step_00000004")},
    )
    lines = steps_of(run_ranks(1, _train_once, branch, {"stop_after": 6})[0])
    assert list(lines) == [5, 6]
    # The branch's own checkpoint, not the one it came from, is where its next job goes on.
    assert list(steps_of(run_ranks(1, _train_once, branch, {})[0])) == list(range(5, 13))


def _branched(config: Config, source: Config) -> tuple[int, list[dict[str, Any]]]:
    """Updates that AdamW counts when it takes up `source`'s checkpoint; the branch's lines."""
    path = source.run.directory / "checkpoints" / "step_00000004"
    model = build_model(config, 512, Topology.of(config.parallel, torch.device("cpu")))
    optimizer = build_optimizer(config, model)
    load_state(CheckpointStore(path.parent, keep=1), path, model, optimizer)
    assert not any(local_part(state).any() for state in optimizer.state_tensors().values())
    return optimizer.updates, train(config)


@pytest.mark.parametrize(("name", "other"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_takes_up_the_weights_alone_and_in_a_new_run(
    tiny_run: Callable[..., Config], name: str, other: str
) -> None:
    first = tiny_run("run", optimizer={"name": name})
    run_ranks(1, _train_once, first, {"stop_after": 4})
    message = run_ranks(1, _refused, tiny_run("run", optimizer={"name": other}))[0]
    assert f"optimizer.name: was {name}, is {other}; may change only in a new run" in message
    resume = {"resume": str(first.run.directory / "checkpoints" / "step_00000004")}
    branch = tiny_run("branch", optimizer={"name": other}, checkpoint=resume)
    updates, lines = run_ranks(2, _branched, branch, first)[0]
    assert updates == 0
    assert list(steps_of(lines)) == list(range(5, 13))
    assert steps_of(lines)[12]["loss"] < steps_of(lines)[5]["loss"]


def test_the_dry_run_says_where_the_job_would_go_on_or_that_it_may_not(
    tiny_run: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny_run()
    dry_run(config, 1)
    assert "begins      afresh" in caplog.text
    run_ranks(1, _train_once, config, {"stop_after": 4})
    dry_run(config, 1)
    saved = config.run.directory / "checkpoints" / "step_00000004"
    assert f"goes on     from {saved}" in caplog.text
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        dry_run(tiny_run(optimizer={"lr": 0.5}), 1)


def test_the_dry_run_of_a_job_that_would_go_on_plans_its_rows_once(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run()
    run_ranks(1, _train_once, config, {"stop_after": 2})
    made: list[RowSource] = []

    def make(config: Config, tokenizer: Tokenizer) -> RowSource:
        made.append(training_source(config, tokenizer))
        return made[-1]

    monkeypatch.setattr(dry_run_module, "training_source", make)
    dry_run(config, 1)
    assert len(made) == 1


def test_a_run_directory_given_for_a_checkpoint_is_told_from_one(
    tiny_run: Callable[..., Config],
) -> None:
    first = tiny_run("first")
    run_ranks(1, _train_once, first, {"stop_after": 2})
    branch = tiny_run("branch", checkpoint={"resume": str(first.run.directory)})
    message = run_ranks(1, _refused, branch)[0]
    assert "is a run directory" in message
    assert str(first.run.directory / "checkpoints" / "step_00000002") in message


@pytest.mark.parametrize(
    ("made", "problem"), [(False, "no such folder"), (True, "holds no manifest.json")]
)
def test_what_is_no_checkpoint_at_all_is_refused_by_the_keys_name(
    tiny_run: Callable[..., Config], tmp_path: Path, made: bool, problem: str
) -> None:
    if made:
        (tmp_path / "start").mkdir()
    with pytest.raises(UserError) as caught:
        dry_run(tiny_run(checkpoint={"resume": str(tmp_path / "start")}), 1)
    assert f"checkpoint.resume={tmp_path / 'start'}: {problem}" in str(caught.value)
    assert "runs/NAME/checkpoints/step_00001234" in str(caught.value)


def test_a_run_without_its_checkpoints_begins_anew_and_keeps_the_metrics_of_before(
    tiny_run: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny_run(valid=False)
    run = config.run.directory
    before = run_ranks(1, _train_once, config, {"stop_after": 5})[0]
    shutil.rmtree(run / "checkpoints")
    dry_run(config, 1)
    assert f"begins      afresh; {run / 'metrics.jsonl'}, of an earlier start" in caplog.text
    after = run_ranks(1, _train_once, config, {"stop_after": 2})[0]
    assert list(steps_of(after)) == [1, 2]
    assert read(run / "metrics.before-1.jsonl") == before


def test_a_branch_that_died_before_its_first_checkpoint_keeps_its_metrics(
    tiny_run: Callable[..., Config],
) -> None:
    first = tiny_run("run", valid=False)
    run_ranks(1, _train_once, first, {"stop_after": 4})
    resume = {"resume": str(first.run.directory / "checkpoints" / "step_00000004")}
    branch = tiny_run("branch", valid=False, checkpoint={**resume, "interval": 100})
    run_ranks(1, _train_once, branch, {"kill_in": 8})
    lines = run_ranks(1, _train_once, branch, {"stop_after": 5})[0]
    assert list(steps_of(lines)) == [5]
    kept = read(branch.run.directory / "metrics.before-1.jsonl")
    assert next(iter(steps_of(kept))) == 5


def test_resume_none_refuses_to_mix_with_the_checkpoints_of_before(
    tiny_run: Callable[..., Config],
) -> None:
    run_ranks(1, _train_once, tiny_run(), {"stop_after": 2})
    message = run_ranks(1, _refused, tiny_run(checkpoint={"resume": "none"}))[0]
    assert "checkpoint.resume=none" in message
    assert "another run.dir" in message


def test_a_checkpoint_of_the_runs_own_directory_is_no_place_to_branch_off_from(
    tiny_run: Callable[..., Config],
) -> None:
    first = tiny_run()
    run_ranks(1, _train_once, first, {"stop_after": 6})
    earlier = first.run.directory / "checkpoints" / "step_00000003"
    message = run_ranks(1, _refused, tiny_run(checkpoint={"resume": str(earlier)}))[0]
    assert str(earlier) in message
    assert "checkpoint.resume=auto" in message


def test_data_made_anew_under_the_same_name_is_refused_in_the_same_run(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path
) -> None:
    for suffix in ("bin", "idx", "json"):
        shutil.copy(tiny_data / f"train.{suffix}", tmp_path / f"mine.{suffix}")
    data = {"train": [{"prefix": str(tmp_path / "mine")}]}
    run_ranks(1, _train_once, tiny_run(data=data), {"stop_after": 2})
    for suffix in ("bin", "idx", "json"):
        shutil.copy(tiny_data / f"valid.{suffix}", tmp_path / f"mine.{suffix}")
    message = run_ranks(1, _refused, tiny_run(data=data))[0]
    assert f"{tmp_path / 'mine'} had " in message
    assert "60 documents" in message
    assert "50 documents" in message


def _recorded_data(config: Config, text: Path) -> tuple[list[str], Any, int]:
    """A corpus as it was when a job opened it, as a save after a change has it, and readings."""
    readings, sha256 = 0, hashlib.sha256

    def begin_reading() -> Any:
        nonlocal readings
        readings += 1
        return sha256()

    directory = RunDirectory(config.run.directory)
    with pytest.MonkeyPatch.context() as patch, closing(directory):
        patch.setattr(OpenCorpus, "check_unchanged", lambda _: None)
        patch.setattr(corpora, "hashlib", SimpleNamespace(sha256=begin_reading))
        trainer = Trainer(config, torch.device("cpu"), directory)
        opened = trainer._source.fingerprint()
        text.write_bytes(bytes(text.stat().st_size))
        trainer.run(Stops(stop_after=1))
    newest = CheckpointStore(config.run.paths.checkpoints, keep=1).folders()[0]
    return opened, Manifest.read(newest).state["data"], readings


def test_a_save_records_the_data_that_the_job_opened_though_they_changed_since(
    tiny_run: Callable[..., Config], tiny_data: Path, tmp_path: Path
) -> None:
    for suffix in ("bin", "idx", "json"):
        shutil.copy(tiny_data / f"train.{suffix}", tmp_path / f"mine.{suffix}")
    config = tiny_run(data={"train": [{"prefix": str(tmp_path / "mine")}]})
    opened, saved, readings = run_ranks(1, _recorded_data, config, tmp_path / "mine.bin")[0]
    assert saved == opened
    assert readings == 2, "of what is trained on and of what is evaluated"
    assert "was trained on other data" in run_ranks(1, _refused, config)[0]


def test_other_weights_of_the_corpora_are_refused_in_the_same_run(
    tiny_run: Callable[..., Config],
) -> None:
    run_ranks(1, _train_once, tiny_run(), {"stop_after": 2})
    other = tiny_run()
    data = other.data.model_copy(
        update={"train": (other.data.train[0].model_copy(update={"weight": 2.0}),)}
    )
    message = run_ranks(1, _refused, other.model_copy(update={"data": data}))[0]
    assert "data.train.0.weight" in message


def test_a_run_in_fp8_is_not_gone_on_with_by_other_kernels(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "facts_at_hand", lambda _: ComputeDevice("cuda", (9, 0)))
    precision = {"compute": "bf16", "fp8": "current"}
    old, new = (
        run_config(tiny_data, tmp_path, precision=precision, kernels=kernels)
        for kernels in ("torch", "auto")
    )
    state = RunState(tmp_path, {"config": config_dict(old), "step": 3})
    rest: tuple[Any, Any] = (None, None)
    with pytest.raises(ConfigError, match="with kernels = fused other products are in FP8"):
        resume.check_continuity(StartingPoint(tmp_path, new_run=False), state, new, *rest)
