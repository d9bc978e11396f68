"""Megatron-LM's arguments become a configuration, and nothing of them is lost in silence."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.checks import check_config
from megatron_bert.config.keys import all_keys, key_at
from megatron_bert.config.load import config_dict, load_config
from megatron_bert.errors import ConfigError
from megatron_bert.translation.argument import Fate
from megatron_bert.translation.document import render_file
from megatron_bert.translation.emit_table import GUIDE_FILE, main, render
from megatron_bert.translation.table import ARGUMENTS, find
from megatron_bert.translation.translate import Translation, translate
from tools import translate_megatron as tool

DOCS = Path(__file__).resolve().parents[2] / "docs"

# What a run cannot do without, in the size of BERT large as Megatron-LM's example has it.
LARGE = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 "
    "--max-position-embeddings 512 --micro-batch-size 4 --global-batch-size 32 --lr 0.0001"
)
# The rest of that example's arguments.
EXAMPLE = f"""
{LARGE} --train-iters 1000000 --attention-backend auto --weight-decay 1e-2 --clip-grad 1.0 --fp16
--lr-decay-iters 990000 --lr-decay-style linear --min-lr 1.0e-5 --lr-warmup-fraction .01
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path data/wiki
--vocab-file vocab.txt --split 949,50,1 --log-interval 100 --save-interval 10000
--eval-interval 1000 --save runs/large --load runs/large --eval-iters 10
--tensorboard-dir logs
"""
# What is known of RetrievaBERT's training there.
RETRIEVABERT = """
--num-layers 48 --hidden-size 1536 --ffn-hidden-size 4096 --swiglu --num-attention-heads 24
--group-query-attention --num-query-groups 1 --max-position-embeddings 2048 --seq-length 512
--norm-epsilon 1e-12 --bert-no-binary-head --micro-batch-size 16 --global-batch-size 1024
--train-iters 192000 --lr 1.5e-4 --min-lr 1e-6 --lr-decay-style linear --lr-warmup-fraction 0.01
--bf16 --tokenizer-model llm-jp.model --data-path 0.6 ja_cc 0.4 en_refinedweb
"""


def _of(text: str) -> Translation:
    return translate(text.split())


def _short(extra: str) -> dict[str, Any]:
    return _of(f"{LARGE} --train-iters 1000 --bf16 {extra}").tree


def test_the_published_example_becomes_a_configuration_that_loads(tmp_path: Path) -> None:
    translation = _of(EXAMPLE)
    path = tmp_path / "large.yaml"
    path.write_text(render_file(translation))
    config = load_config(path, ["log.tensorboard=false"])
    check_config(config, world_size=128)
    assert (config.model.num_layers, config.model.ffn_hidden_size) == (24, 2688)
    assert (config.parallel.tensor, config.parallel.pipeline) == (8, 16)
    assert config.schedule.warmup_steps == 9900
    assert config.data.held_out_fraction == pytest.approx(0.05)
    assert config.optimizer.min_lr == 1e-5
    assert config.precision.compute == "bf16"
    told = path.read_text()
    assert "# - --vocab-file vocab.txt: WordPiece" in told
    assert not translation.unknown


def test_retrievaberts_arguments_become_its_preset_and_learning_rate() -> None:
    tree = _of(RETRIEVABERT).tree
    assert tree["model"] == {
        "num_layers": 48, "hidden_size": 1536, "ffn_hidden_size": 4096, "num_attention_heads": 24,
        "num_query_groups": 1, "max_position_embeddings": 2048, "norm_eps": 1e-12,
        "init_std": 0.02, "hidden_dropout": 0.1, "attention_dropout": 0.1,
    }  # fmt: skip
    assert tree["schedule"] == {"decay": "linear", "warmup_fraction": 0.01}
    assert tree["data"]["train"] == [
        {"prefix": "ja_cc", "weight": 0.6},
        {"prefix": "en_refinedweb", "weight": 0.4},
    ]
    assert _of(RETRIEVABERT).differs == ()


@pytest.mark.parametrize(
    ("extra", "section", "expected"),
    [
        ("--data-path a b", "data",
         [{"prefix": "a", "epochs": 1.0}, {"prefix": "b", "epochs": 1.0}]),
        ("--train-data-path a --valid-data-path 1 v", "data", [{"prefix": "a"}]),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 100", "schedule",
         {"decay": "wsd", "warmup_steps": 0, "wsd_decay_fraction": 0.1}),
        ("--lr-warmup-samples 320", "schedule", {"decay": "linear", "warmup_steps": 10}),
        ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2", "parallel",
         {"pipeline": 4, "pipeline_schedule": "interleaved", "virtual_stages": 3}),
        ("--sequence-parallel", "parallel", None),
        ("--tensor-model-parallel-size=2 --sequence-parallel", "parallel",
         {"tensor": 2, "sequence": True}),
        ("--recompute-granularity full", "recompute", "full"),
        ("--profile --profile-step-end 20", "profile", {"steps": "11:20"}),
        ("--wandb-project p --wandb-exp-name n", "log",
         {"interval": 100, "wandb": {"name": "n", "mode": "online", "project": "p"}}),
        ("--fp8-format hybrid", "precision", {"compute": "bf16", "fp8": "current"}),
        ("--optimizer muon", "mlm", {"probability": 0.15, "unit": "ngram", "max_ngram": 3}),
    ],
)  # fmt: skip
def test_arguments_that_belong_together_are_read_together(
    extra: str, section: str, expected: object
) -> None:
    found = _short(extra).get(section)
    assert (found["train"] if section == "data" else found) == expected


def test_that_tensorboards_folder_is_another_is_told() -> None:
    differs = _of(f"{LARGE} --train-iters 10 --tensorboard-dir logs/tb").differs
    assert "log.tensorboard = true: its files stand in the run directory, not in logs/tb" in differs


@pytest.mark.parametrize("data", ["--data-path a --split 9,1,0", "--train-data-path a"])
def test_without_evaluation_nothing_is_held_out(data: str) -> None:
    translation = _of(f"{LARGE} --train-iters 10 --eval-iters 0 --valid-data-path v {data}")
    assert translation.tree["data"] == {
        "train": [{"prefix": "a"}],
        "tokenizer": "NAME-THE-TOKENIZER.model",
    }
    assert "eval" not in translation.tree
    assert any("with --eval-iters 0 nothing is evaluated" in line for line in translation.differs)


def test_arguments_of_older_releases_are_known() -> None:
    old = "--data-impl mmap --DDP-impl local --no-query-key-layer-scaling --checkpoint-num-layers 1"
    translation = _of(f"{LARGE} --train-iters 10 {old}")
    assert translation.unknown == ()
    assert any(line.startswith("--data-impl mmap:") for line in translation.holds)


def test_samples_become_steps() -> None:
    assert _of(f"{LARGE} --train-samples 3200").tree["curriculum"] == [
        {"seq_length": 512, "steps": 100}
    ]


def test_what_is_not_understood_is_named() -> None:
    translation = _of(
        f"stray {LARGE} --train-iters 10 --clip-grads 2 --deepspeed --normalization RMSNorm"
    )
    assert translation.unknown == (
        "--clip-grads 2: unknown; is it --clip-grad?",
        "--deepspeed: unknown",
        "stray: stands behind no argument",
    )
    assert any(line.startswith("--normalization RMSNorm:") for line in translation.lacks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-layers 2", "--hidden-size, --num-attention-heads.*add what the run had"),
        (
            f"{LARGE} --train_iters 9",
            r"add what the run had; is --train_iters meant to be --train-it",
        ),
        (f"{LARGE} --train-iters many", "--train-iters many: not a number; give a number"),
        (f"{LARGE} --train-iters 9 --split a,b", "--split a,b: give shares"),
        (f"{LARGE} --train-iters 9 --data-path 1 a 2", "the last weight has no dataset"),
        (f"{LARGE} --train-iters 9 --seq-length 1024", "longer than model.max_position"),
        (f"{LARGE} --train-iters 9 --hidden-dropout 2", r"dropout \(--hidden-dropout\) = 2.0: e"),
        # Megatron-LM divides by them.
        (f"{LARGE} --train-iters 9 --eval-interval 0", r"interval \(--eval-interval\) = 0: expect"),
        (f"{LARGE} --train-iters 9 --log-interval 0", r"interval \(--log-interval\) = 0: expected"),
        (f"{LARGE} --train-iters 9 --save-interval 0", r"interval \(--save-interval\) = 0: expect"),
        (
            f"{LARGE} --train-iters 9 --hidden-size 1000 --num-attention-heads 7",
            r"model.hidden_size \(--hidden-size\) = 1000: .* \(--num-attention-heads\) = 7",
        ),
        (
            f"{LARGE} --train-iters 9 --data-path 0 a 1 b",
            r"data.train.0.weight \(--data-path\) = 0",
        ),
    ],
)
def test_what_cannot_become_a_configuration_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _of(arguments)


def test_every_key_of_the_table_exists_and_every_flag_stands_in_it_once() -> None:
    keys = set(all_keys())
    for entry in ARGUMENTS:
        assert bool(entry.keys) == (entry.fate is Fate.BECOMES), entry.name
        for key in entry.keys:
            path = [int(part) if part.isdigit() else part for part in key.split(".")]
            assert key in keys or key_at(path), f"{entry.name}: {key}"
        assert entry.keys or entry.note, entry.name
    flags = [flag for entry in ARGUMENTS for flag in entry.flags]
    assert sorted({flag for flag in flags if flags.count(flag) > 1}) == []


# Of every argument that becomes a key: a value, and the other arguments that it needs.
SAMPLES = {
    "--num-layers": "12", "--hidden-size": "2048", "--ffn-hidden-size": "512",
    "--num-attention-heads": "8", "--num-query-groups": "4 --group-query-attention",
    "--max-position-embeddings": "1024", "--norm-epsilon": "1e-6", "--init-method-std": "0.01",
    "--hidden-dropout": "0.3", "--attention-dropout": "0.3", "--data-path": "a",
    "--train-data-path": "a", "--valid-data-path": "a", "--split": "8,1,1 --data-path data/train",
    "--tokenizer-model": "a.model", "--padded-vocab-size": "512", "--mask-prob": "0.3",
    "--seq-length": "128", "--train-iters": "500", "--train-samples": "960",
    "--global-batch-size": "64", "--micro-batch-size": "8", "--seed": "1",
    "--deterministic-mode": "", "--optimizer": "muon", "--lr": "1e-3", "--min-lr": "1e-6",
    "--weight-decay": "0.1", "--adam-beta1": "0.8", "--adam-beta2": "0.98", "--adam-eps": "1e-6",
    "--clip-grad": "0.5", "--muon-momentum": "0.9", "--lr-decay-style": "cosine",
    "--lr-warmup-fraction": "0.1", "--lr-warmup-iters": "10", "--lr-warmup-samples": "64",
    "--lr-wsd-decay-iters": "100 --lr-decay-style WSD",
    "--lr-wsd-decay-samples": "64 --lr-decay-style WSD", "--eval-interval": "5",
    "--eval-iters": "5", "--save": "a", "--save-interval": "5", "--async-save": "",
    "--log-interval": "5", "--tensorboard-dir": "a", "--wandb-project": "p",
    "--wandb-exp-name": "n", "--profile": "", "--profile-step-start": "5 --profile",
    "--profile-step-end": "20 --profile", "--exit-duration-in-mins": "5",
    "--tensor-model-parallel-size": "2", "--pipeline-model-parallel-size": "2",
    "--num-layers-per-virtual-pipeline-stage": "6 --pipeline-model-parallel-size 2",
    "--num-virtual-stages-per-pipeline-rank": "2 --pipeline-model-parallel-size 2",
    "--sequence-parallel": "--tensor-model-parallel-size 2",
    "--data-parallel-sharding-strategy": "optim_grads_params",
    "--num-distributed-optimizer-instances": "2", "--distributed-timeout-minutes": "5",
    "--bf16": "", "--fp16": "", "--grad-reduce-in-bf16": "", "--fp8-format": "e4m3 --bf16",
    "--recompute-activations": "", "--recompute-granularity": "full",
}  # fmt: skip


def test_every_argument_with_a_key_sets_that_key() -> None:
    entries = {entry.name: entry for entry in ARGUMENTS if entry.fate is Fate.BECOMES}
    assert set(SAMPLES) == set(entries)
    for flag, sample in SAMPLES.items():
        value, context, others = sample.partition("--")
        length = "" if flag == "--train-samples" else "--train-iters 1000"
        base = f"{LARGE} {length} {context}{others}"
        with_it = translate([*base.split(), flag, *value.split()]).tree
        without = {} if not length else _of(base).tree
        changed = {key for key in entries[flag].keys if _at(with_it, key) != _at(without, key)}
        assert changed, flag


def _at(tree: Any, key: str) -> object:
    """The value of a key, of a list's first entry where the key has an N."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[0]
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def test_the_guides_table_is_the_tools() -> None:
    guide = (DOCS / GUIDE_FILE).read_text(encoding="utf-8")
    assert guide == render(guide), "run python -m megatron_bert.translation.emit_table"
    with pytest.raises(ConfigError, match="markers"):
        render("no markers")


def test_the_table_is_written_whole_and_only_where_the_guide_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        main(["--docs", str(tmp_path)])
    (tmp_path / GUIDE_FILE).write_bytes((DOCS / GUIDE_FILE).read_bytes())
    assert main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / GUIDE_FILE).read_bytes() == (DOCS / GUIDE_FILE).read_bytes()


def test_a_family_does_not_hide_an_argument_of_its_own() -> None:
    assert find("--wandb-save-dir") is not find("--wandb-project")
    assert find("--nothing-of-the-kind") is None


def test_the_tool_writes_a_file_that_loads_and_says_what_is_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.sh"
    script.write_text(f"torchrun pretrain_bert.py {' '.join(EXAMPLE.split())}\n")
    output = tmp_path / "large.yaml"
    tool.main([str(script), "--output", str(output)])
    told = capsys.readouterr().out
    assert "data.tokenizer: no --tokenizer-model was given" in told
    assert f"next: fill in what is listed, then python pretrain_bert.py --config {output}" in told
    tree = config_dict(load_config(output))
    assert (tree["run"]["dir"], tree["data"]["train"][0]["prefix"]) == ("runs/large", "data/wiki")
    with pytest.raises(ConfigError, match="--overwrite"):
        tool.main(["--output", str(output), "--", *EXAMPLE.split()])
    tool.main(["--", *LARGE.split(), "--train-iters", "5"])
    assert "num_layers: 24" in capsys.readouterr().out


def test_the_tool_reads_what_a_script_prints_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = f"torchrun --nnodes 2 /opt/pretrain_bert.py {LARGE} --train-iters 5 --seed 7\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(printed))
    tool.main(["-"])
    assert "seed: 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a file"),
        (["x.sh", "--", "--a"], "give either a file"),
        (["nowhere.sh"], "nowhere.sh: No such file"),
    ],
)
def test_the_tool_refuses_what_it_cannot_read(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tool.main(arguments)
