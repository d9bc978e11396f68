from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_bert.config.architectures import ARCHITECTURES, ArchitectureName
from megatron_bert.config.load import config_dict, dump_config, load_config
from megatron_bert.config.presets import PRESETS
from megatron_bert.config.schema import Config, ModelConfig
from megatron_bert.config.yaml_text import format_document, parse_document
from megatron_bert.errors import ConfigError
from tests.config.conftest import SMALL, Build


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_what_is_not_given_has_its_documented_default(build: Build) -> None:
    config = build()
    assert config.optimizer.lr == 1.5e-4
    assert config.mlm.unit == "token"
    assert config.recompute == "none"
    assert config.checkpoint.async_ is False
    assert config.model.head_dim == 16


def test_the_run_directory_is_named_after_the_file_unless_it_is_given(build: Build) -> None:
    assert build().run.directory == Path("runs/small")
    assert build("run.dir=null").run.directory == Path("runs/small")
    assert build("run.dir=../elsewhere").run.directory == Path("../elsewhere")


def test_a_loaded_configuration_cannot_be_changed(build: Build) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build().optimizer.lr = 1.0  # type: ignore[misc]


def test_a_preset_gives_the_shape_and_explicit_keys_override_it(small_file: Path) -> None:
    config = load_config(small_file, ["model={preset: retrievabert-1.3b, num_layers: 12}"])
    assert config.model.num_layers == 12
    assert config.model.hidden_size == 1536
    assert config.model.vocab_size == 99584


def test_every_preset_is_a_complete_model() -> None:
    for name in PRESETS:
        assert ModelConfig(preset=name).head_dim > 0  # type: ignore[call-arg]


def test_overrides_apply_in_order_and_reach_list_entries(build: Build) -> None:
    config = build(
        "optimizer.lr=1e-3",
        "optimizer.lr=2e-3",
        "data.train.1.prefix=third",
        "log.wandb.mode=offline",
    )
    assert config.optimizer.lr == 2e-3
    assert [corpus.prefix for corpus in config.data.train] == ["first", "third"]
    assert config.log.wandb.mode == "offline"


def test_overrides_reach_what_a_stage_sets_itself(build: Build) -> None:
    config = build("curriculum.0.batch.global_size=256", "curriculum.2.mlm.probability=0.3")
    assert config.curriculum[0].batch.global_size == 256
    assert config.curriculum[2].mlm.probability == 0.3
    assert config.curriculum[1].batch.global_size is None


def test_an_override_of_an_alias_leaves_its_anchor_alone(small_file: Path) -> None:
    text = yaml.safe_dump({key: SMALL[key] for key in ("model", "curriculum", "batch")})
    text += "data:\n  tokenizer: t\n  train: &corpora [{prefix: a}]\n  valid: *corpora\n"
    small_file.write_text(text, encoding="utf-8")
    config = load_config(small_file, ["data.valid.0.prefix=b"])
    assert (config.data.train[0].prefix, config.data.valid[0].prefix) == ("a", "b")


def test_a_section_whose_keys_are_all_commented_out_is_empty(small_file: Path) -> None:
    with small_file.open("a", encoding="utf-8") as file:
        file.write("log:\n  # interval: 5\noptimizer:\n")
    assert load_config(small_file).log.interval == 10


def test_a_stages_section_whose_keys_are_all_commented_out_is_empty(small_file: Path) -> None:
    tree = SMALL | {"curriculum": [{"seq_length": 32, "steps": 1, "batch": None}]}
    small_file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert load_config(small_file).curriculum[0].batch.global_size is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", r"model\.num_layer = 3 \(command line\): .* model\.num_layers\?"),
        ("optimzer.lr=1", r"optimzer\.lr = 1 .* did you mean optimizer\.lr\?"),
        ("lr=1", r"^lr = 1 .* did you mean optimizer\.lr\?"),
        ("run.interval=1", r"one of checkpoint\.interval, eval\.interval, log\.interval\?"),
        ("data.trian.0.prefix=x", r"did you mean data\.train\.0\.prefix\?"),
        ("data.train.0.prefx=x", r"data\.train\.0\.prefx .* data\.train\.0\.prefix\?"),
        ("curriculum.0.batch.globl_size=1", r"did you mean curriculum\.0\.batch\.global_size\?"),
        ("batch.qqq=1", r"batch\.qqq = 1 .* batch has global_size, micro_size, micro_tokens"),
        ("optimizer.learning_rate=1", r"unknown key; optimizer has name, lr, min_lr, weight_decay"),
        ("optimizer.warmup_frac=0.1", r"did you mean schedule\.warmup_fraction\?"),
        ("checkpoint.async_=true", r"did you mean checkpoint\.async\?"),
        (
            "model.preset=retrievabert",
            r'"retrievabert" .*expected one of retrievabert-1\.3b, modernbert-base or null',
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_right_one(
    small_file: Path, override: str, message: str
) -> None:
    assert re.search(message, refusal(small_file, override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.num_layers='48'",
            'model.num_layers = "48" (command line): expected an integer > 0',
        ),
        ("model.num_layers=1e3", "expected an integer > 0; write 1000"),
        ("model.num_layers=true", "model.num_layers = true (command line): expected an integer"),
        ("model.num_layers=010", "expected an integer > 0; write it without quotes"),
        ("parallel.sequence=yes", "expected true or false; write true"),
        ("data.tokenizer=2024", 'expected non-empty text; quote it: "2024"'),
        ("precision.compute=fp16", "expected one of bf16, fp32; did you mean bf16?"),
        ("compile.cuda_graphs=atuo", "expected one of auto, true, false; did you mean auto?"),
        ("compile.cuda_graphs=on", "expected one of auto, true, false; write true"),
        ("compile.cuda_graphs=1", "compile.cuda_graphs = 1 (command line): expected one of auto"),
        ("compile.cuda_graphs=0.0", "expected one of auto, true, false"),
        ("optimizer.beta1=1", "expected a number >= 0 and < 1"),
        ("optimizer.lr=.inf", "expected a number > 0; give a finite one, e.g. 0.00015"),
        (
            "optimizer.lr=nan",
            'optimizer.lr = "nan" (command line): expected a number > 0; give a finite one, e.g. '
            "0.00015",
        ),
        ("optimizer.lr=-inf", "expected a number > 0; give a finite one, e.g. 0.00015"),
        ("run.max_minutes=inf", "expected a number > 0 or null; give a finite one"),
        ("optimizer.lr='1e-4'", "expected a number > 0; write it without quotes"),
        (
            "optimizer.lr=fast",
            'optimizer.lr = "fast" (command line): expected a number > 0, e.g. 0.00015',
        ),
        ("curriculum=[]", "curriculum = [] (command line): expected a list of {seq_length, steps,"),
        ("curriculum.0.seq_length=7", "expected an integer >= 8"),
        ("curriculum.0.batch.global_size=0", "expected an integer > 0 or null"),
        ("curriculum.0.mlm.probability=1", "expected a number > 0 and < 1 or null"),
        ("curriculum.0.lr_factor=0", "expected a number > 0"),
        ("eval=3", "expected a section with interval, batches, fixed_seq_length"),
        ("recompute.x=1", "expected one of none, selective, full"),
        ('run.dir=""', 'run.dir = "" (command line): expected non-empty text or null'),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_expected(
    small_file: Path, override: str, message: str
) -> None:
    assert message in refusal(small_file, override)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_true_and_false_may_stand_beside_a_name(
    small_file: Path, text: str, value: str | bool
) -> None:
    config = load_config(small_file, [f"compile.cuda_graphs={text}"])
    assert config.compile.cuda_graphs == value
    assert f"cuda_graphs: {text}\n" in dump_config(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "override 'optimizer.lr': write it as key.path=value"),
        ("=1", "write it as key.path=value"),
        ("a..b=1", "write it as key.path=value"),
        ("run.dir=", "the value is empty; write run.dir=null for none"),
        ("data.train=[", "override 'data.train=[', line 1:"),
        ("data.train.2.prefix=x", "data.train has entries 0 to 1; to add one, give the whole list"),
        ("data.train.x.prefix=x", "data.train is a list; name an entry by its index"),
        ("model.num_layers.x=1", "model.num_layers = 2 is a value, not a section"),
    ],
)
def test_a_malformed_override_is_refused_with_the_right_form(
    small_file: Path, override: str, message: str
) -> None:
    assert message in refusal(small_file, override)


def test_all_problems_of_a_file_come_in_one_message(small_file: Path) -> None:
    message = refusal(
        small_file,
        "model.num_layer=1",
        "run.seed=-1",
        "nonsense",
        "batch={}",
        "data.train.0.weight=0",
    )
    first, *lines = message.splitlines()
    assert first == f"5 problems in {small_file}:"
    assert len(lines) == 5
    assert "  batch.global_size is missing: give an integer > 0 (Rows in one optimizer" in message


def test_a_misspelt_required_key_is_one_problem_and_not_two(small_file: Path) -> None:
    message = refusal(small_file, "batch={global_sice: 4}")
    assert "\n" not in message
    assert "did you mean batch.global_size?" in message


def test_a_problem_in_the_file_is_given_with_its_line(small_file: Path) -> None:
    small_file.write_text("run:\n  seed: 1\n  sed: 2\n", encoding="utf-8")
    message = refusal(small_file)
    assert f"run.sed = 2 ({small_file}, line 3): unknown key; did you mean run.seed?" in message
    assert "model is missing: give a section with preset, num_layers" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"run:\n  seed: 1\n  dir: a\n  seed: 2\n",
            "line 4: the key seed is given twice, first in",
        ),
        (b"run: [1\nmodel: 2\n", "line 2:"),
        (b"run:\n\tseed: 1\n", "line 2:"),
        (b"1: 2\n", "line 1: a key must be a name"),
        (b"run: *nowhere\n", "line 1: found undefined alias"),
        (b"run: &a [*a]\n", "nested too deeply"),
        (b"run: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
        (b"a: 1\n---\nb: 1\n", "line 2: expected a single document"),
        (b"run: \x07\n", "not readable as YAML: unacceptable character"),
        (b"run: \xff\n", "not UTF-8 (byte 5); save the file as UTF-8"),
        (b"- run\n", "write sections such as"),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_its_line(
    small_file: Path, content: bytes, message: str
) -> None:
    small_file.write_bytes(content)
    refused = refusal(small_file)
    assert str(small_file) in refused
    assert message in refused


def test_a_missing_file_is_refused_with_its_name_and_the_remedy(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none.yaml")
    assert "none.yaml does not exist; give an existing file; examples/" in message
    assert "cannot be read" in refusal(tmp_path)


def test_scalars_are_read_as_in_yaml_1_2() -> None:
    text = "[1e-4, 1.5E+3, .5, 1_000, -3, 0, true, no, on, 010, '1', 1:30, 2026-01-31, ~, 0x10]"
    value, _ = parse_document(text, "text")
    read: list[Any] = [1e-4, 1500.0, 0.5, 1000, -3, 0, True]
    read += ["no", "on", "010", "1", "1:30", "2026-01-31", None, "0x10"]
    assert value == read
    assert [type(entry) for entry in value] == [type(entry) for entry in read]


def test_merge_keys_may_repeat_what_they_merge() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\n"
    value, _ = parse_document(text, "text")
    assert value["c"] == {"x": 2, "y": 3}


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        ["1e-4", "1_0", "yes", "010", "null", "~", "<<", ".5", "1.", "=", "- a", "a: b"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(value=VALUES)
def test_what_is_written_as_yaml_reads_back_equal_and_of_the_same_types(value: Any) -> None:
    read, _ = parse_document(format_document(value), "text")
    assert read == value
    assert repr(read) == repr(value)


POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    prefix=TEXT,
    run_dir=TEXT,
    seed=st.integers(0, 2**63 - 1),
    lr=POSITIVE,
    max_minutes=st.none() | POSITIVE,
    unit=st.sampled_from(["token", "whole_word", "ngram"]),
    is_async=st.booleans(),
)
def test_a_dumped_configuration_loads_to_an_equal_one(
    tmp_path_factory: pytest.TempPathFactory,
    prefix: str,
    run_dir: str,
    seed: int,
    lr: float,
    max_minutes: float | None,
    unit: str,
    is_async: bool,
) -> None:
    config = Config.model_validate(
        SMALL
        | {
            "run": {"dir": run_dir, "seed": seed, "max_minutes": max_minutes},
            "data": {"tokenizer": prefix, "train": [{"prefix": f"{prefix} data"}]},
            "optimizer": {"lr": lr, "min_lr": 0},
            "mlm": {"unit": unit},
            "checkpoint": {"async": is_async},
        }
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_bytes(dump_config(config).encode())
    assert load_config(path) == config
    assert config_dict(load_config(path)) == config_dict(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_that_an_architecture_does_not_use_are_those_described_as_anothers(
    architecture: ArchitectureName,
) -> None:
    described = {
        name
        for name, field in ModelConfig.model_fields.items()
        for other in ARCHITECTURES
        if other != architecture and (field.description or "").startswith(f"`{other}`: ")
    }
    model = ModelConfig(preset="retrievabert-1.3b", architecture=architecture)  # type: ignore[call-arg]
    assert model.unused_keys == described
    assert bool(described) == (architecture == "retrievabert")
