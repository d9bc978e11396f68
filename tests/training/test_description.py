"""The plan that a run prints: its layout, its stages, its memory, its waste."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from megatron_bert.config.kernels import ComputeDevice
from megatron_bert.config.load import load_config
from megatron_bert.config.parameters import parameter_count, rank_parameters, rank_state_bytes
from megatron_bert.data.source import training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.training.description import describe_data, describe_plan, tell_plan
from megatron_bert.training.held_out import HeldOutRows
from megatron_bert.words import times
from tests.core.support import write_documents
from tests.small_model import small_config

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "retrievabert_1.3b.yaml"
VOCABULARY = 99_584
CPU, GPU = ComputeDevice("cpu"), ComputeDevice("cuda")


def plan(world_size: int, *overrides: str, device: ComputeDevice = GPU) -> list[str]:
    return list(describe_plan(load_config(EXAMPLE, overrides), VOCABULARY, world_size, device))


def line(name: str, lines: list[str]) -> str:
    (found,) = [line.removeprefix(name).strip() for line in lines if line.split()[0] == name]
    return found


def test_one_process_has_a_layout_of_one_rank() -> None:
    lines = plan(1)
    assert line("layout", lines) == "1 rank: data 1 x tensor 1"
    assert not [line for line in lines if line.endswith("blocks")]


def test_the_plan_says_what_computes() -> None:
    pytorchs = (
        "bf16; weights and states fp32; kernels torch (auto): PyTorch's, on CUDA attention "
        "(BF16) and the head's softmax our own"
    )
    assert line("compute", plan(1)) == (
        "bf16; weights and states fp32; kernels fused (auto): our own between the blocks' "
        "products, the rest as with torch, passes recorded (CUDA graphs)"
    )
    assert line("compute", plan(1, device=CPU)) == pytorchs
    assert line("compute", plan(1, "compile.enabled=true")) == f"{pytorchs}, blocks compiled"
    recorded = line("compute", plan(1, "compile.cuda_graphs=true"))
    assert recorded == line("compute", plan(1))
    for launched in (
        plan(1, "compile.cuda_graphs=false"),
        plan(2, "parallel.tensor=2"),
        plan(2, "parallel.reshard_after_forward=true"),
    ):
        assert recorded == f"{line('compute', launched)}, passes recorded (CUDA graphs)"
    assert line("compute", plan(1, "kernels=te", "precision.fp8=current")) == (
        "bf16; weights and states fp32; kernels te: "
        "Transformer Engine's linear layers, the rest as with torch; products in FP8 (current)"
    )


def test_the_plan_says_what_is_trained_how_long_and_where_it_is_written() -> None:
    lines = plan(1, "run.dir=runs/first")
    assert line("model", lines) == (
        "1,301,388,032 parameters, vocabulary 99,584; 48 layers, hidden 1,536, feed-forward 4,096, "
        "24 heads, 1 key/value head"
    )
    first, *_ = (line for line in lines if line.startswith("curriculum"))
    assert first.startswith("curriculum  454,000 steps, 187,301,888,000 token slots (187.3 B); ")
    places = "to   runs/first: metrics.jsonl; a checkpoint every 1,000 steps, the newest 3 are kept"
    assert line("writes", lines) == places
    loggers = ("log.wandb.mode=offline", "log.wandb.project=encoders", "log.tensorboard=true")
    assert line("writes", plan(1, "run.dir=runs/first", *loggers)) == (
        f"{places}; Weights & Biases offline, project encoders; TensorBoard"
    )


def test_a_tiny_run_is_told_in_units_of_its_size() -> None:
    config = small_config(curriculum=[{"seq_length": 32, "steps": 1}])
    lines = list(describe_plan(config, 128, 1, CPU))
    assert f"curriculum  1 step, {32 * config.batch.global_size} token slots" in lines
    assert line("memory", lines).startswith("0.34 MiB a rank")


def test_on_a_terminal_a_long_line_goes_on_under_its_text_and_in_a_file_it_stays_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lines = plan(1)
    tell_plan(lines)
    assert caplog.messages == lines
    caplog.clear()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    tell_plan(lines)
    shown = caplog.messages
    assert max(map(len, shown)) <= 80
    labels = {line[:12] for line in lines}
    assert {line[:12] for line in shown} == {*labels, " " * 12}
    assert " ".join(" ".join(shown).split()) == " ".join(" ".join(lines).split())


def planned_with_data(
    folder: Path, tokenizer: Tokenizer, corpora: int, stages: int, *, whole: bool = False
) -> list[str]:
    """All lines of a plan but its warnings."""
    names = [str(folder / f"corpus{number}") for number in range(corpora)]
    for name in names:
        write_documents(Path(name), [[50, 51, 52]] * 40)
    config = small_config(
        model={"num_layers": 2},
        data={"train": [{"prefix": name} for name in names], "held_out_fraction": 0.2},
        curriculum=[{"seq_length": 32, "steps": 1}] * stages,
        parallel={"pipeline": 2},
        checkpoint={"interval": 1, "keep": 1},
    )
    training = training_source(config, tokenizer)
    lines = [
        *describe_plan(config, tokenizer.vocab_size, 4, CPU, whole=whole),
        *describe_data(training, HeldOutRows.plan(config, tokenizer), whole=whole),
    ]
    return [line for line in lines if not line.startswith("warning")]


def test_the_plan_of_four_stages_and_five_corpora_is_ten_lines_that_tell_all(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    lines = planned_with_data(tmp_path, tiny_tokenizer, corpora=5, stages=4)
    assert len(lines) == 10
    text = "\n".join(lines)
    assert all(text.count(f"stage {stage}: length 32, ") == 1 for stage in range(1, 5))
    train = [line for line in lines if line.startswith("train")]
    assert [line.count("corpus") for line in train] == [3, 2]
    assert line("layout", lines) == "4 ranks: pipeline 2 (1f1b) x data 2 x tensor 1; 1, 1 blocks"
    assert line("valid", lines).endswith("; and 2 more (pretrain_bert.py --dry-run lists them)")
    assert "a checkpoint every step, the newest is kept" in text


def test_the_plan_of_any_run_is_ten_lines_and_a_dry_runs_has_one_for_each_thing(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    lines = planned_with_data(tmp_path, tiny_tokenizer, corpora=9, stages=12)
    assert len(lines) == 10
    curriculum, train = (
        [line for line in lines if line.startswith(name)][-1] for name in ("curriculum", "train")
    )
    assert curriculum.endswith("; and 7 more (pretrain_bert.py --dry-run lists them)")
    assert train.endswith("; and 3 more (pretrain_bert.py --dry-run lists them)")
    everything = planned_with_data(tmp_path, tiny_tokenizer, corpora=9, stages=12, whole=True)
    counts = Counter(line.split()[0] for line in everything)
    assert (counts["curriculum"], counts["train"], counts["valid"]) == (13, 9, 9)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (545419.454, "545,419 times"),
        (99.96, "99.96 times"),
        (6.53, "6.53 times"),
        (1.00001, "1 time"),
        (0.42134, "0.4213 times"),
    ],
)
def test_how_often_is_told_in_few_digits(count: float, text: str) -> None:
    assert times(count) == text


def test_one_is_not_told_as_several() -> None:
    lines = plan(
        1, "model.num_layers=1", "batch.micro_tokens=64", "curriculum=[{seq_length: 64, steps: 1}]"
    )
    assert "; 1 layer, hidden" in line("model", lines)
    total, stage = (line for line in lines if line.startswith("curriculum"))
    assert total.startswith("curriculum  1 step, ")
    assert stage.endswith(" x 1 row a rank")


def test_without_the_tokenizer_the_plan_says_what_is_unknown() -> None:
    lines = list(describe_plan(load_config(EXAMPLE, []), None, 1, CPU))
    assert line("model", lines).startswith("parameters unknown without the tokenizer")


def test_the_layout_names_every_kind_of_parallelism() -> None:
    lines = plan(
        320,
        "parallel.tensor=4",
        "parallel.sequence=true",
        "parallel.pipeline=5",
        "parallel.pipeline_schedule=interleaved",
        "parallel.replicate=2",
        "recompute=selective",
    )
    layout, blocks, recomputation = line("layout", lines).split("; ")
    assert layout == (
        "320 ranks: pipeline 5 (interleaved, 2 stages a rank) x data 16 (2 copies x 8 shards) x "
        "tensor 4 (sequence parallel)"
    )
    assert recomputation == "recomputation selective"
    counts = blocks.removesuffix(" blocks").split(", ")
    assert len(counts) == 10
    assert sum(map(int, counts)) == 48


def test_the_layout_leaves_out_what_has_no_effect() -> None:
    lines = plan(2, "parallel.sequence=true", "parallel.pipeline_schedule=zero_bubble")
    assert line("layout", lines) == "2 ranks: data 2 x tensor 1"


def test_a_pipeline_s_stages_are_told_by_their_blocks() -> None:
    layout = line("layout", plan(5, "parallel.pipeline=5"))
    assert layout.endswith("; 9, 10, 10, 10, 9 blocks")


@pytest.mark.parametrize(
    ("overrides", "world_size", "shards"),
    [
        ([], 8, 8),
        (["parallel.replicate=4"], 8, 2),
        (["parallel.tensor=2"], 8, 4),
        (["parallel.pipeline=5", "parallel.tensor=2"], 40, 4),
    ],
)
def test_memory_is_the_fullest_rank_s_share_of_weights_gradients_and_moments(
    overrides: list[str], world_size: int, shards: int
) -> None:
    counts = [rank.total for rank in rank_parameters(load_config(EXAMPLE, overrides), VOCABULARY)]
    gibibytes = max(counts) * 16 / shards / 2**30
    memory = line("memory", plan(world_size, *overrides))
    rank = "on the fullest rank" if len(counts) > 1 else "a rank"
    assert memory.startswith(f"{gibibytes:.2f} GiB {rank} for weights, gradients and moments")


def test_muon_needs_a_quarter_less_for_the_blocks_matrices() -> None:
    (both,), (one,) = (
        rank_state_bytes(load_config(EXAMPLE, overrides), VOCABULARY)
        for overrides in ([], ["optimizer.name=muon"])
    )
    # Query and output, key and value of one head, gate, up and down of 48 blocks.
    assert both - one == 4 * 48 * 1536 * (2 * 1536 + 2 * 64 + 3 * 4096)
    memory = line("memory", plan(1, "optimizer.name=muon"))
    assert memory.startswith(f"{one / 2**30:.2f} GiB a rank")


def test_the_plan_says_that_gradients_are_reduced_in_bf16_where_several_ranks_have_rows() -> None:
    reduced = "bf16; weights and states fp32; gradients reduced in bf16; kernels "
    assert line("compute", plan(2, "precision.reduce=bf16")).startswith(reduced)
    assert "reduced" not in line("compute", plan(2, "precision.reduce=bf16", "parallel.tensor=2"))


def test_a_pipeline_s_ranks_hold_the_model_and_one_more_table() -> None:
    config = load_config(EXAMPLE, ["parallel.pipeline=5"])
    whole = parameter_count(config.model, VOCABULARY)
    assert [rank.total for rank in rank_parameters(load_config(EXAMPLE), VOCABULARY)] == [whole]
    held = sum(rank.total for rank in rank_parameters(config, VOCABULARY))
    assert held == whole + VOCABULARY * 1536


def test_surplus_rows_that_fill_a_pipeline_are_shown_in_per_cent() -> None:
    curriculum = "curriculum=[{seq_length: 512, steps: 10}]"
    # 10 rows a rank of pipelines that take no fewer than 8 micro-batches: 8 of 2 rows each.
    lines = plan(16, curriculum, "batch.global_size=20", "parallel.pipeline=8")
    assert lines[-3].endswith("8 x 2 rows a rank, 12 surplus rows (37.5 %)")
    assert "surplus" not in plan(16, curriculum, "batch.global_size=32", "parallel.pipeline=8")[-2]


def test_the_plan_warns_where_much_is_computed_for_nothing() -> None:
    curriculum = "curriculum=[{seq_length: 128, steps: 10}]"
    lines = plan(8, curriculum, "batch.global_size=2", "parallel.pipeline=8")
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "75 % of the rows that stage 1 computes are surplus" in warning
    lines = plan(8, curriculum, "batch.global_size=64", "parallel.pipeline=8")
    assert not [line for line in lines if line.startswith("warning")]
