from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert.config import checks
from megatron_bert.config import kernels as config_kernels
from megatron_bert.config.arithmetic import resolve_vocab_size
from megatron_bert.config.checks import check_config
from megatron_bert.errors import ConfigError
from tests.config.conftest import Build, refusal
from tests.stand_ins import install


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.hidden_size=66"],
            "model.hidden_size = 66: not divisible by model.num_attention_heads = 4; "
            "use 64 or 68, or 1, 2, 3, 6, 11 or 22 heads",
        ),
        (
            ["model.num_query_groups=3"],
            "model.num_query_groups = 3: does not divide model.num_attention_heads = 4; "
            "use 1, 2 or 4",
        ),
        (
            ["curriculum.1.seq_length=256"],
            "curriculum.1.seq_length = 256: longer than model.max_position_embeddings = 128; "
            "use at most 128, or model.max_position_embeddings=256",
        ),
        (
            ["eval.fixed_seq_length=129", "data.held_out_fraction=0.1"],
            "eval.fixed_seq_length = 129: longer than",
        ),
        (["mlm.random_ratio=0.5"], "mlm.random_ratio = 0.5: together with mlm.mask_ratio = 0.8"),
        (["optimizer.min_lr=1"], "optimizer.min_lr = 1: larger than optimizer.lr = 0.00015"),
        (["schedule.warmup_steps=351"], "longer than the run of 350 steps; use at most 350"),
        (
            ["schedule.warmup_steps=5", "schedule.warmup_fraction=0.1"],
            "schedule.warmup_fraction = 0.1 is given too; set one of them to null",
        ),
        (
            ["schedule.decay=wsd", "schedule.warmup_steps=175", "schedule.wsd_decay_fraction=0.6"],
            "schedule.wsd_decay_fraction = 0.6: 210 steps of decay and 175 of warm-up are more "
            "than the run's 350; use at most 0.5",
        ),
        (["batch.micro_size=1", "batch.micro_tokens=64"], "set one of them to null"),
        (
            ["profile.steps=ten"],
            "profile.steps = ten: give the first and the last step, e.g. 10:12",
        ),
        (["profile.steps=-1:3"], "profile.steps = -1:3: give the first and the last step"),
        (
            ["profile.steps=9:7"],
            "profile.steps = 9:7: the last step comes before the first; give 7:9",
        ),
        (["profile.steps=349:351"], "profile.steps = 349:351: the run's steps are 1:350; use"),
        (["profile.steps=0:2"], "profile.steps = 0:2: the run's steps are 1:350; use some of them"),
        (
            ["profile.steps=5:25"],
            "profile.steps = 5:25: 21 steps, which are recorded in memory; use at most 20, e.g. "
            "5:7",
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble", "recompute=full"],
            "recompute = full: parallel.pipeline_schedule = zero_bubble would compute the "
            "activations again twice, for the inputs' gradients and for the weights'; use "
            "recompute=none, or parallel.pipeline_schedule=interleaved",
        ),
        (
            [
                "parallel.pipeline=2",
                "parallel.pipeline_schedule=zero_bubble",
                "compile.enabled=true",
            ],
            "compile.enabled = true: compiled graphs give away buffers that "
            "parallel.pipeline_schedule = zero_bubble needs again for the weights' gradients; use "
            "compile.enabled=false, or parallel.pipeline_schedule=interleaved",
        ),
        (
            ["data.train.1.prefix=./first"],
            "the same corpus as data.train.0; give it once, with the weights added",
        ),
        (
            ["data.train=[{prefix: a, epochs: 1}, {prefix: a, epochs: 2}]"],
            "the same corpus as data.train.0; give it once, with the epochs added",
        ),
        (["data.train.0.prefix=a/b.idx"], "is one file of the dataset; give its prefix, a/b"),
        (
            ["data.train.0.epochs=2"],
            "data.train.1.weight = 2: data.train.0.epochs = 2 is given too; give all corpora",
        ),
        (
            ["data.train.0.epochs=2", "data.train.0.weight=1", "data.train.1.weight=null"],
            "data.train.0.weight = 1: data.train.0.epochs = 2 is given too",
        ),
        (
            ["data.train.1.epochs=2", "data.train.1.weight=null"],
            "data.train.0.epochs is missing: data.train.1.epochs = 2 is given, and a corpus "
            "without epochs has a data.train.0.weight of 1",
        ),
    ],
)
def test_contradicting_values_are_refused_with_values_that_work(
    build: Build, overrides: list[str], message: str
) -> None:
    assert message in refusal(build, *overrides)


@pytest.mark.parametrize(
    ("key", "path", "left"),
    [
        ("run.dir", "$1", "$1"),
        ("run.dir", "runs/$NAME-x", "$NAME"),
        ("run.dir", "runs/${NAME:-a}/b", "${NAME:-a}"),
        ("run.dir", "~/runs", "~"),
        ("data.tokenizer", "~you/my.model", "~you"),
        ("data.train.1.prefix", "$(pwd)/ja", "$(pwd)"),
        ("checkpoint.resume", "$HOME/start", "$HOME"),
    ],
)
def test_a_path_that_waits_for_a_shell_is_refused(
    build: Build, key: str, path: str, left: str
) -> None:
    text = refusal(build, f"{key}='{path}'")
    assert f"{key} = {path}: {left} is for a shell, which reads no configuration file" in text
    assert "write out that home" in text if left == "~you" else "for, or " in text


def test_the_remedy_for_a_home_is_one_that_a_shell_puts_in(build: Build) -> None:
    remedy = "or as an override, in double quotes: $HOME/runs/a"
    assert remedy in refusal(build, "run.dir='~/runs/a'")
    # Bash leaves the mark of a home as it is behind `run.dir=`.
    words = subprocess.run(
        ["bash", "-c", 'printf "%s\\n" run.dir=~/a "run.dir=~/a" "run.dir=$HOME/a"'],
        env={"HOME": "/h"},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout.split()
    assert words == ["run.dir=~/a", "run.dir=~/a", "run.dir=/h/a"]


@pytest.mark.parametrize("path", ["runs/a~", "runs/~a", "runs/5$", "./~old"])
def test_a_path_with_a_mark_that_no_shell_would_replace_is_taken(build: Build, path: str) -> None:
    assert build(f"run.dir={path}").run.dir == path


def test_keys_of_a_pipeline_have_no_effect_without_one(build: Build) -> None:
    schedule = ["parallel.pipeline_schedule=zero_bubble", "parallel.virtual_stages=9"]
    check_config(build(*schedule, "recompute=full", "compile.enabled=true"), world_size=1)


def test_corpora_may_all_be_blended_by_epochs(build: Build) -> None:
    check_config(
        build("data.train=[{prefix: a, epochs: 1}, {prefix: b, epochs: 0.5}]"), world_size=1
    )


def test_a_held_out_corpus_given_twice_has_no_weights_to_add(build: Build) -> None:
    message = refusal(build, "data.valid=[{prefix: a}, {prefix: a}]")
    assert message.endswith(
        "data.valid.1.prefix = a: the same corpus as data.valid.0; give it once"
    )


def test_evaluation_without_held_out_data_is_fine(build: Build) -> None:
    check_config(build("data.valid=[]", "eval.interval=5"), world_size=1)


def test_modernbert_has_a_key_value_head_for_each_query_head_of_paired_channels(
    build: Build,
) -> None:
    modernbert = "model.architecture=modernbert"
    check_config(build(modernbert, "model.num_query_groups=4"), world_size=1)
    message = refusal(build, modernbert, "model.num_query_groups=2")
    assert "model.num_query_groups = 2: model.architecture = modernbert has a key/value" in message
    odd = ("model.hidden_size=12", "model.num_query_groups=4")
    assert "heads of 3 channels" in refusal(build, modernbert, *odd)


@pytest.mark.parametrize(
    ("override", "package", "off"),
    [
        ("log.wandb.mode=online", "wandb", "disabled"),
        ("log.tensorboard=true", "tensorboard", "false"),
    ],
)
def test_a_logger_whose_package_is_missing_is_refused(
    build: Build, override: str, package: str, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_config(build(override), world_size=1)
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    message = refusal(build, override)
    assert f"the package {package} is not installed; pip install {package}, or use {off}" in message


def test_a_folder_with_a_loggers_name_is_not_taken_for_its_package(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As wandb leaves one where it ran.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert "package wandb is not installed" in refusal(build, "log.wandb.mode=online")


@pytest.mark.parametrize(
    ("kernels", "install", "others"),
    [
        (
            "te",
            "pip install --no-build-isolation 'transformer_engine[pytorch]'",
            "torch, fused, apex",
        ),
        (
            "apex",
            "build https://github.com/NVIDIA/apex with its CUDA extensions",
            "torch, fused, te",
        ),
    ],
)
def test_kernels_of_a_package_that_is_missing_are_refused(
    build: Build, kernels: str, install: str, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_kernels, "find_spec", lambda _: None)
    message = refusal(build, f"kernels={kernels}")
    assert message.startswith(f"kernels = {kernels}: the package ")
    assert "is not installed" in message
    assert f"{install}, or use one of auto, {others}" in message
    for name in ("auto", "torch"):
        check_config(build(f"kernels={name}"), world_size=1)
    on_cpu = refusal(build, f"kernels={kernels}", "run.device=cpu")
    assert "it computes on CUDA only and run.device = cpu; use torch or auto" in on_cpu


def test_the_registrys_apex_is_told_from_nvidias_without_importing_it(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(build, "kernels=apex")
    assert "the package apex is not NVIDIA's: there is no apex.optimizers.FusedAdam" in message
    assert "the package registry's apex is another project" in message
    (package / "optimizers").mkdir()
    (package / "optimizers" / "fused_adam.py").touch()
    check_config(build("kernels=apex"), world_size=1)


def test_fused_kernels_are_refused_where_they_cannot_be(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "triton")
    check_config(build("kernels=fused"), world_size=1)
    zero_bubble = ("parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble")
    check_config(build("kernels=fused", "model.num_layers=4", *zero_bubble), world_size=2)
    message = refusal(build, "kernels=fused", "run.device=cpu")
    assert message.startswith("kernels = fused: it computes on CUDA only and run.device = cpu")
    message = refusal(build, "kernels=fused", "compile.enabled=true")
    assert "kernels = fused: its kernels stand where compiled ones would" in message
    assert "use compile.enabled=false, or kernels=torch" in message
    check_config(build("kernels=fused", "precision.fp8=current"), world_size=1)
    fp8 = ("precision.fp8=current", "parallel.tensor=2")
    message = refusal(build, "kernels=fused", *fp8, world_size=2)
    assert "kernels = fused: it scales FP8 numbers by what one rank knows" in message
    assert "parallel.tensor = 2; use parallel.tensor=1, or kernels=torch" in message
    monkeypatch.setattr(config_kernels, "find_spec", lambda _: None)
    message = refusal(build, "kernels=fused")
    assert message.startswith("kernels = fused: the package triton is not installed; install")


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("parallel.tensor=2", "use parallel.tensor=1, or compile.cuda_graphs=false"),
        ("parallel.pipeline=2", "use parallel.pipeline=1, or compile.cuda_graphs=false"),
        (
            "parallel.reshard_after_forward=true",
            "use parallel.reshard_after_forward=false, or compile.cuda_graphs=false",
        ),
        ("compile.enabled=true", "use compile.enabled=false, or compile.cuda_graphs=false"),
        ("kernels=apex", "use kernels=auto, or compile.cuda_graphs=false"),
        ("run.device=cpu", "run.device = cpu; use compile.cuda_graphs=false"),
    ],
)
def test_cuda_graphs_are_refused_where_passes_cannot_be_recorded(
    build: Build, key: str, remedy: str
) -> None:
    check_config(build("compile.cuda_graphs=true"), world_size=2)
    message = refusal(build, "compile.cuda_graphs=true", key, world_size=2)
    assert "compile.cuda_graphs = true: " in message
    assert remedy in message
    if key != "kernels=apex":  # which is not installed
        for allowed in ("auto", "false"):
            check_config(build(f"compile.cuda_graphs={allowed}", key), world_size=2)


def test_transformer_engine_takes_no_zero_bubbles(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "transformer_engine")
    keys = ("kernels=te", "parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble")
    message = refusal(build, *keys, world_size=2)
    assert "kernels = te: Transformer Engine computes both gradients of a layer at once" in message
    assert "use kernels=torch, or parallel.pipeline_schedule=interleaved" in message


def test_transformer_engine_takes_no_fp32(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "transformer_engine")
    message = refusal(build, "kernels=te", "precision.compute=fp32")
    assert "kernels = te: Transformer Engine multiplies fp32 in TF32" in message
    assert "precision.compute = fp32; use precision.compute=bf16, or kernels=torch" in message
    check_config(build("kernels=te"), world_size=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble"],
            "parallel.pipeline_schedule = zero_bubble takes them apart; use parallel.pipeline_sch",
        ),
        (["precision.compute=fp32"], "precision.compute = fp32; use precision.compute=bf16, or"),
        (["model.ffn_hidden_size=136"], "model.ffn_hidden_size = 136 gives products whose sides"),
        (["curriculum.0.seq_length=24"], "curriculum.0.seq_length = 24 is no multiple of 16; use"),
        (
            ["eval.fixed_seq_length=100", "data.held_out_fraction=0.1"],
            "eval.fixed_seq_length = 100 is no multiple of 16; use 112",
        ),
        (
            ["parallel.tensor=2"],
            "model.num_query_groups x head size = 32 over parallel.tensor = 2 ranks",
        ),
    ],
)
@pytest.mark.parametrize("kernels", ["te", "auto"])
def test_fp8_products_are_refused_where_they_cannot_be(
    build: Build, kernels: str, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "transformer_engine")
    fp8 = (f"kernels={kernels}", "precision.fp8=current")
    check_config(build(*fp8), world_size=1)
    if message.startswith("model.num_query_groups"):
        overrides = [*overrides, "model.num_attention_heads=8"]
        message = message.replace("= 32", "= 16")
    refused = refusal(build, *fp8, *overrides, world_size=2)
    assert message in refused
    assert "precision.fp8 = current: " in refused


def test_fp8_asks_nothing_of_a_length_of_evaluation_where_nothing_is_held_out(
    build: Build,
) -> None:
    check_config(build("precision.fp8=current", "eval.fixed_seq_length=100"), world_size=1)


@pytest.mark.parametrize(
    ("keys", "in_fp8"),
    [
        ((), False),
        (("kernels=fused",), False),
        (("kernels=torch",), True),
        (("compile.enabled=true",), True),
        (("run.device=cpu",), True),
    ],
)
def test_fp8_asks_for_a_width_of_keys_and_values_where_their_products_are_in_it(
    build: Build, keys: tuple[str, ...], in_fp8: bool
) -> None:
    # One group of 64 / 8 channels.
    narrow = ("model.num_attention_heads=8", "model.num_query_groups=1", "precision.fp8=current")
    message = "model.num_query_groups x head size = 8 gives products whose sides"
    if in_fp8:
        assert message in refusal(build, *narrow, *keys)
    else:
        build(*narrow, *keys)


def test_the_vocabulary_follows_the_tokenizer_padded_to_a_multiple_of_128(build: Build) -> None:
    assert resolve_vocab_size(build().model, 99574) == 99584
    assert resolve_vocab_size(build().model, 128) == 128


def test_a_set_vocabulary_holds_the_tokenizer(build: Build) -> None:
    model = build("model.vocab_size=1000").model
    assert resolve_vocab_size(model, 1000) == 1000
    with pytest.raises(ConfigError, match="the tokenizer has 1001 pieces; use 1024"):
        resolve_vocab_size(model, 1001)


def test_a_vocabulary_is_refused_among_ranks_that_do_not_divide_it(build: Build) -> None:
    config = build("parallel.tensor=3")
    check_config(build("parallel.tensor=4"), world_size=4, vocab_size=1000)
    with pytest.raises(ConfigError) as refused:
        check_config(config, world_size=3, vocab_size=1000)
    assert (
        "parallel.tensor = 3: does not divide model.vocab_size = 1000; use 1, 2, 4, 5 or 8, "
        "or start the run with model.vocab_size=1152"
    ) in str(refused.value)


def test_layouts_that_are_named_as_working_pass_the_checks_of_fp8(build: Build) -> None:
    asked = ("precision.fp8=current", "precision.compute=bf16", "model.ffn_hidden_size=400")
    with pytest.raises(ConfigError) as refused:
        check_config(build(*asked, "parallel.pipeline=64"), world_size=64)
    # 400 / 2 is no multiple of 16.
    assert "parallel.tensor=2" not in str(refused.value)


def test_keys_that_an_automatic_layout_chooses_may_say_anything(build: Build) -> None:
    leftover = (
        "parallel.pipeline=2",
        "parallel.pipeline_schedule=zero_bubble",
        "compile.enabled=true",
        "recompute=full",
    )
    with pytest.raises(ConfigError, match="zero_bubble"):
        build(*leftover)
    assert build(*leftover, "parallel.layout=auto").parallel.layout == "auto"
