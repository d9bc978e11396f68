from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bert.config.errors import ConfigError
from megatron_bert.config.identity import Change, change_of, changed_keys, check_resume
from megatron_bert.config.keys import all_keys
from megatron_bert.config.load import config_dict
from tests.config.conftest import Build

# The small run has stages of 100, 200 and 50 steps: this lies in the second one.
IN_THE_SECOND_STAGE = 150


def resume(
    build: Build, *overrides: str, steps: int = IN_THE_SECOND_STAGE, new_run: bool = False
) -> None:
    check_resume(config_dict(build()), build(*overrides), steps, new_run)


def refusal(
    build: Build, *overrides: str, steps: int = IN_THE_SECOND_STAGE, new_run: bool = False
) -> str:
    with pytest.raises(ConfigError) as caught:
        resume(build, *overrides, steps=steps, new_run=new_run)
    return str(caught.value)


def test_every_key_of_the_schema_has_a_class_of_change() -> None:
    leaves = [key.name for key in all_keys().values() if key.is_leaf]
    assert len(leaves) > 50
    for name in leaves:
        expects_curriculum = name.startswith("curriculum")
        assert (change_of(name) is Change.CURRICULUM) == expects_curriculum


def test_a_key_that_the_schema_lacks_has_no_class() -> None:
    with pytest.raises(KeyError):
        change_of("no.such.key")


def test_changed_keys_are_named_as_the_user_writes_them(build: Build) -> None:
    old = config_dict(build())
    new = config_dict(build("optimizer.lr=1", "data.train.1.weight=3", "checkpoint.async=true"))
    assert changed_keys(old, old) == []
    assert changed_keys(old, new) == ["data.train.1.weight", "optimizer.lr", "checkpoint.async"]


def test_added_list_entries_are_changes(build: Build) -> None:
    new = config_dict(build("data.valid=[{prefix: v}]"))
    assert changed_keys(config_dict(build()), new) == [
        "data.valid.0.prefix",
        "data.valid.0.weight",
    ]


def test_keys_of_other_versions_count_as_their_defaults_or_not_at_all(build: Build) -> None:
    old = config_dict(build())
    del old["compile"], old["optimizer"]["max_skipped"]
    old["retired"] = {"key": 1}
    assert changed_keys(old, config_dict(build())) == []
    assert changed_keys(old, config_dict(build("compile.enabled=true"))) == ["compile.enabled"]


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
    ],
)
def test_free_keys_change_within_a_run(build: Build, override: str) -> None:
    resume(build, override)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1e-3",
        "schedule.decay=cosine",
        "mlm.probability=0.3",
        "data.train.0.weight=5",
        "data.train.0.prefix=other",
        "data.train=[{prefix: first}]",
        "run.seed=1",
        "model.hidden_dropout=0",
        "precision.compute=fp32",
        "curriculum.2.seq_length=96",
        "curriculum.2.steps=40",
        "curriculum.1.steps=180",
    ],
)
def test_other_keys_change_only_in_a_new_run(build: Build, override: str) -> None:
    message = refusal(build, override)
    assert "may change only in a new run: set checkpoint.resume to the checkpoint's path" in message
    resume(build, override, new_run=True)


@pytest.mark.parametrize(
    "override",
    ["model.num_layers=3", "model.norm_eps=1e-6", "batch.global_size=16", "data.tokenizer=other"],
)
def test_shape_tokenizer_and_batch_never_change(build: Build, override: str) -> None:
    assert "cannot change once training has begun" in refusal(build, override, new_run=True)


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
    check_resume(config_dict(old), new, IN_THE_SECOND_STAGE, new_run=False)
    paths[1].write_bytes(b"other pieces")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: was"):
        check_resume(config_dict(old), new, IN_THE_SECOND_STAGE, new_run=False)


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
    assert "curriculum.3: was absent, is" in refusal(build, added)
    resume(build, added, new_run=True)
    removed = "curriculum=[{seq_length: 32, steps: 100}, {seq_length: 64, steps: 200}]"
    assert "only in a new run" in refusal(build, removed)
    resume(build, removed, new_run=True)
    assert "cannot change" in refusal(build, removed, steps=301, new_run=True)
