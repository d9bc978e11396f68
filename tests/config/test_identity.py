from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bert.config import change_table, stage_changes
from megatron_bert.config.change_table import Change, Refusal, change_of
from megatron_bert.config.identity import changed_keys, check_resume
from megatron_bert.config.keys import all_keys
from megatron_bert.config.load import config_dict
from megatron_bert.config.stage_changes import curriculum_problems
from megatron_bert.errors import ConfigError
from tests.config.conftest import Build

# The small run has stages of 100, 200 and 50 steps: this lies in the second one.
IN_THE_SECOND_STAGE = 150


def resume(
    build: Build, *overrides: str, steps: int = IN_THE_SECOND_STAGE, new_run: bool = False
) -> None:
    check_resume(config_dict(build()), build(*overrides), steps, new_run, checkpoint="runs/a/step")


def refusal(
    build: Build, *overrides: str, steps: int = IN_THE_SECOND_STAGE, new_run: bool = False
) -> str:
    with pytest.raises(ConfigError) as caught:
        resume(build, *overrides, steps=steps, new_run=new_run)
    return str(caught.value)


def test_every_key_of_the_schema_has_a_class_of_change() -> None:
    leaves = [key.name for key in all_keys().values() if key.is_leaf]
    assert len(leaves) > 50
    with_rules_of_their_own = [name for name in leaves if change_of(name) is Change.CURRICULUM]
    assert with_rules_of_their_own == [
        "curriculum.N.seq_length",
        "curriculum.N.steps",
        "curriculum.N.batch.global_size",
        "batch.global_size",
    ]


def test_a_key_that_the_schema_lacks_has_no_class() -> None:
    with pytest.raises(KeyError):
        change_of("no.such.key")


def test_changed_keys_are_named_as_the_user_writes_them(build: Build) -> None:
    old = config_dict(build())
    new = config_dict(build("optimizer.lr=1", "data.train.1.weight=3", "checkpoint.async=true"))
    assert changed_keys(old, old) == []
    assert changed_keys(old, new) == ["data.train.1.weight", "optimizer.lr", "checkpoint.async"]


def test_added_list_entries_are_changes_in_what_they_set(build: Build) -> None:
    new = config_dict(build("data.valid=[{prefix: v}]"))
    assert changed_keys(config_dict(build()), new) == ["data.valid.0.prefix"]


def test_keys_of_other_versions_count_as_their_defaults_or_not_at_all(build: Build) -> None:
    old = config_dict(build())
    del old["compile"], old["optimizer"]["max_skipped"]
    old["retired"] = {"key": 1}
    for stage in old["curriculum"]:
        del stage["batch"], stage["mlm"], stage["lr_factor"]
    assert changed_keys(old, config_dict(build())) == []
    assert changed_keys(old, config_dict(build("compile.enabled=true"))) == ["compile.enabled"]
    check_resume(old, build(), IN_THE_SECOND_STAGE, new_run=False, checkpoint="runs/a/step")
    with pytest.raises(ConfigError, match=r"curriculum\.2\.lr_factor: was 1\.0, is 2"):
        check_resume(
            old,
            build("curriculum.2.lr_factor=2"),
            IN_THE_SECOND_STAGE,
            new_run=False,
            checkpoint="runs/a/step",
        )


def test_the_weight_that_corpora_had_before_it_could_be_left_out_is_no_change(
    build: Build,
) -> None:
    old = config_dict(build())
    assert old["data"]["train"][0]["weight"] is None
    old["data"]["train"][0]["weight"] = 1.0
    check_resume(old, build(), IN_THE_SECOND_STAGE, new_run=False, checkpoint="runs/a/step")


@pytest.mark.parametrize(
    "override",
    [
        "parallel.tensor=2",
        "batch.micro_size=2",
        "recompute=full",
        "compile.enabled=true",
        "log.interval=1",
        "checkpoint.keep=9",
        "eval.interval=7",
        "data.valid=[{prefix: held_out}]",
        "run.max_minutes=5",
        "data.train.0.prefix=./first",
        "data.train.0.weight=1",
        "data.threads=4",
        "curriculum.1.batch.global_size=8",
        "curriculum.2.mlm.probability=0.15",
        "curriculum.0.lr_factor=1.0",
    ],
)
def test_free_keys_change_within_a_run(build: Build, override: str) -> None:
    resume(build, override)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1e-3",
        "optimizer.name=muon",
        "precision.reduce=bf16",
        "schedule.decay=cosine",
        "mlm.probability=0.3",
        "data.train.0.weight=5",
        "data.train.0.prefix=other",
        "data.train=[{prefix: first}]",
        "run.seed=1",
        "model.hidden_dropout=0",
        "precision.compute=fp32",
        "data.train=[{prefix: first, epochs: 1}, {prefix: second, epochs: 1}]",
        "data.held_out_fraction=0.1",
        "curriculum.2.batch.global_size=16",
        "curriculum.0.mlm.probability=0.3",
        "curriculum.1.mlm.probability=0.3",
        "curriculum.2.mlm.probability=0.3",
        "curriculum.1.lr_factor=0.5",
        "curriculum.2.lr_factor=0.5",
        "curriculum.2.seq_length=96",
        "curriculum.2.steps=40",
        "curriculum.1.steps=180",
    ],
)
def test_other_keys_change_only_in_a_new_run(build: Build, override: str) -> None:
    message = refusal(build, override)
    assert "may change only in a new run: set checkpoint.resume=runs/a/step" in message
    resume(build, override, new_run=True)


def keys_of_stages() -> list[str]:
    """Those whose class the table has, without what leads to the stage."""
    names = (name for name, key in all_keys().items() if key.is_leaf)
    return [
        name.removeprefix("curriculum.N.")
        for name in names
        if name.startswith("curriculum.N.") and change_of(name) is not Change.CURRICULUM
    ]


def check_key_of_a_stage(build: Build, name: str) -> None:
    old, new = config_dict(build()), config_dict(build())
    *sections, last = name.split(".")
    place = new["curriculum"][2]
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = 0.5
    change = change_of(f"curriculum.N.{name}")
    refused = curriculum_problems(old, new, IN_THE_SECOND_STAGE, new_run=False)
    of_table = [] if change is Change.FREE else [(f"curriculum.2.{name}", 0.5, change)]
    assert [(one.key, one.after, one.change) for one in refused if isinstance(one, Refusal)] == (
        of_table
    )
    refused = curriculum_problems(old, new, IN_THE_SECOND_STAGE, new_run=True)
    assert bool(list(refused)) == (change is Change.NEVER)


@pytest.mark.parametrize("name", keys_of_stages())
def test_a_key_of_a_stage_changes_when_the_table_says(build: Build, name: str) -> None:
    check_key_of_a_stage(build, name)


@pytest.mark.parametrize("change", [Change.FREE, Change.NEW_RUN, Change.NEVER])
def test_a_key_that_is_new_to_stages_changes_when_the_table_says(
    build: Build, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    name = "curriculum.N.made.up"
    key = replace(all_keys()["curriculum.N.lr_factor"], name=name, default=0.25)
    every_key = {**all_keys(), name: key}
    monkeypatch.setattr(stage_changes, "all_keys", lambda: every_key, raising=False)
    classes = {**change_table._CLASSES, "curriculum": {"N.made.up": change, "": Change.CURRICULUM}}
    monkeypatch.setattr(change_table, "_CLASSES", classes)
    check_key_of_a_stage(build, "made.up")


@pytest.mark.parametrize(
    "override",
    ["model.num_layers=3", "model.norm_eps=1e-6", "data.tokenizer=other"],
)
def test_shape_and_tokenizer_never_change(build: Build, override: str) -> None:
    assert "cannot change once training has begun" in refusal(build, override, new_run=True)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_batch_size_of_a_stage_that_was_begun_never_changes(build: Build, stage: int) -> None:
    message = refusal(build, f"curriculum.{stage}.batch.global_size=16", new_run=True)
    assert f"curriculum.{stage}.batch.global_size: was 8, is 16; cannot change" in message


def test_a_stage_that_the_run_is_just_about_to_begin_may_have_another_batch_size(
    build: Build,
) -> None:
    override = "curriculum.1.batch.global_size=16"
    resume(build, override, steps=100, new_run=True)
    assert "only in a new run" in refusal(build, override, steps=100)
    assert "cannot change" in refusal(build, override, steps=101, new_run=True)


def test_what_a_stages_batch_size_is_counts_and_not_where_it_is_set(build: Build) -> None:
    sizes = [f"curriculum.{stage}.batch.global_size=8" for stage in range(3)]
    resume(build, *sizes)
    begun = "batch.global_size=32", *sizes[:2]
    assert "curriculum" not in refusal(build, *begun)
    assert "batch.global_size: was 8, is 32; may change only in a new run" in refusal(build, *begun)
    resume(build, *begun, new_run=True)


def test_a_new_run_of_another_batch_size_is_told_how_stages_that_have_begun_keep_theirs(
    build: Build,
) -> None:
    message = refusal(build, "batch.global_size=32", new_run=True)
    kept = message.split("; set ")[1].split(" beside it")[0].split()
    assert kept == [f"curriculum.{stage}.batch.global_size=8" for stage in range(2)]
    resume(build, "batch.global_size=32", *kept, new_run=True)


def test_the_size_of_evaluated_batches_changes_only_in_a_new_run(build: Build) -> None:
    overrides = (
        "batch.global_size=32",
        *(f"curriculum.{stage}.batch.global_size=8" for stage in range(3)),
    )
    message = refusal(build, *overrides)
    assert message.startswith("batch.global_size: was 8, is 32; may change only in a new run")
    resume(build, *overrides, new_run=True)


def test_another_batch_size_of_the_run_is_one_problem_and_not_one_a_stage(build: Build) -> None:
    message = refusal(build, "batch.global_size=16")
    assert "\n" not in message
    assert "batch.global_size: was 8, is 16; cannot change" in message


def test_another_masking_rate_of_the_run_is_one_problem_and_not_one_a_stage(build: Build) -> None:
    message = refusal(build, "mlm.probability=0.3")
    assert message.startswith("mlm.probability: was 0.15, is 0.3; may change only in a new run")


def test_a_refusal_gives_key_old_value_new_value_and_all_at_once(build: Build) -> None:
    message = refusal(build, "optimizer.lr=0.001", "model.num_layers=3")
    assert "2 problems" in message
    assert "optimizer.lr: was 0.00015, is 0.001; may change only in a new run" in message
    assert "model.num_layers: was 2, is 3; cannot change" in message


def test_a_moved_tokenizer_of_the_same_content_is_the_same(build: Build, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.model", "b.model")]
    for path in paths:
        path.write_bytes(b"pieces")
    old, new = (build(f"data.tokenizer={path}") for path in paths)
    check_resume(
        config_dict(old), new, IN_THE_SECOND_STAGE, new_run=False, checkpoint="runs/a/step"
    )
    paths[1].write_bytes(b"other pieces")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: was"):
        check_resume(
            config_dict(old), new, IN_THE_SECOND_STAGE, new_run=False, checkpoint="runs/a/step"
        )


def test_a_converted_checkpoint_is_converted_again_for_another_tokenizer(build: Build) -> None:
    message = refusal(build, "data.tokenizer=my.model", steps=0, new_run=True)
    assert "from-hf --tokenizer my.model" in message
    assert "training has begun" not in message


def test_a_vocabulary_left_to_the_tokenizer_may_be_spelt_out(build: Build) -> None:
    resume(build, "model.vocab_size=128")


def test_the_current_and_the_last_stage_may_be_lengthened(build: Build) -> None:
    resume(build, "curriculum.1.steps=500", "curriculum.2.steps=500")


def test_a_finished_run_may_be_lengthened_by_its_last_stage(build: Build) -> None:
    resume(build, "curriculum.2.steps=51", steps=350)


def test_a_stage_at_its_very_end_may_still_be_lengthened(build: Build) -> None:
    resume(build, "curriculum.0.steps=120", steps=100)
    assert "cannot change" in refusal(build, "curriculum.0.steps=120", steps=101)


def test_a_stage_between_the_current_and_the_last_is_lengthened_in_a_new_run_only(
    build: Build,
) -> None:
    assert "only in a new run" in refusal(build, "curriculum.1.steps=300", steps=50)


def test_a_finished_stage_never_changes(build: Build) -> None:
    for override in ("curriculum.0.steps=90", "curriculum.0.seq_length=64"):
        assert "cannot change" in refusal(build, override, new_run=True)


def test_the_current_stage_is_not_shortened_below_what_is_done(build: Build) -> None:
    message = refusal(build, "curriculum.1.steps=49", new_run=True)
    assert "curriculum.1.steps: was 200, is 49, but 50 steps" in message
    assert "use at least 50" in message


def test_stages_are_added_and_removed_in_a_new_run_only(build: Build) -> None:
    added = (
        "curriculum=[{seq_length: 32, steps: 100}, {seq_length: 64, steps: 200}, "
        "{seq_length: 128, steps: 50}, {seq_length: 128, steps: 5}]"
    )
    assert refusal(build, added).startswith("curriculum.3: was absent, is")
    resume(build, added, new_run=True)
    removed = "curriculum=[{seq_length: 32, steps: 100}, {seq_length: 64, steps: 200}]"
    assert "only in a new run" in refusal(build, removed)
    resume(build, removed, new_run=True)
    assert "cannot change" in refusal(build, removed, steps=301, new_run=True)
