"""The plan that a run prints: its layout, its stages, its memory, its waste."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bert.config.load import load_config
from megatron_bert.config.parameters import parameter_count, rank_parameters, rank_state_bytes
from megatron_bert.training.description import describe_plan

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "retrievabert_1.3b.yaml"
VOCABULARY = 99_584


def plan(world_size: int, *overrides: str) -> list[str]:
    return list(describe_plan(load_config(EXAMPLE, overrides), VOCABULARY, world_size))


def line(name: str, lines: list[str]) -> str:
    (found,) = [line.removeprefix(name).strip() for line in lines if line.split()[0] == name]
    return found


def test_one_process_has_a_layout_of_one_rank() -> None:
    lines = plan(1)
    assert line("layout", lines) == "1 rank: data 1 x tensor 1"
    assert not [line for line in lines if line.startswith("stages")]


def test_the_plan_says_what_computes() -> None:
    assert line("kernels", plan(1)).endswith(", attention on CUDA in BF16 our own, blocks compiled")
    uncompiled = "compile.enabled=false"
    assert line("kernels", plan(1, uncompiled)) == (
        "torch (auto): PyTorch's, attention on CUDA in BF16 our own"
    )
    assert line("kernels", plan(1, uncompiled, "kernels=te", "precision.fp8=current")) == (
        "te: Transformer Engine's linear layers, the rest as with torch; products in FP8 (current)"
    )


def test_the_plan_says_what_is_trained_how_long_and_where_it_is_written() -> None:
    lines = plan(1, "run.dir=runs/first")
    assert line("model", lines) == (
        "1,301,388,032 parameters, vocabulary 99,584; 48 layers, hidden 1,536, feed-forward 4,096, "
        "24 heads, 1 key/value heads"
    )
    assert line("curriculum", lines) == "454,000 steps, 187,301,888,000 token slots (187.3 B)"
    places = "to   runs/first: metrics.jsonl; a checkpoint every 1,000 steps, the newest 3 are kept"
    assert line("writes", lines) == places
    loggers = ("log.wandb.mode=offline", "log.wandb.project=encoders", "log.tensorboard=true")
    assert line("writes", plan(1, "run.dir=runs/first", *loggers)) == (
        f"{places}; Weights & Biases offline, project encoders; TensorBoard"
    )


def test_the_plan_of_a_run_of_four_stages_fits_on_a_screen() -> None:
    assert len(plan(1)) == 11


def test_without_the_tokenizer_the_plan_says_what_is_unknown() -> None:
    lines = list(describe_plan(load_config(EXAMPLE, []), None, 1))
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
    assert line("layout", lines) == (
        "320 ranks: pipeline 5 (interleaved, 2 stages a rank) x data 16 (2 copies x 8 shards) x "
        "tensor 4 (sequence parallel); recomputation selective"
    )
    counts = line("stages", lines).removesuffix(" blocks").split(", ")
    assert len(counts) == 10
    assert sum(map(int, counts)) == 48


def test_the_layout_leaves_out_what_has_no_effect() -> None:
    lines = plan(2, "parallel.sequence=true", "parallel.pipeline_schedule=zero_bubble")
    assert line("layout", lines) == "2 ranks: data 2 x tensor 1"


def test_a_pipeline_s_stages_are_told_by_their_blocks() -> None:
    assert line("stages", plan(5, "parallel.pipeline=5")) == "9, 10, 10, 10, 9 blocks"


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
    counts = rank_parameters(load_config(EXAMPLE, overrides), VOCABULARY)
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
    assert line("precision", plan(2, "precision.reduce=bf16")) == (
        "compute bf16; weights and states fp32; gradients reduced in bf16"
    )
    assert "reduced" not in line("precision", plan(2, "precision.reduce=bf16", "parallel.tensor=2"))


def test_a_pipeline_s_ranks_hold_the_model_and_one_more_table() -> None:
    config = load_config(EXAMPLE, ["parallel.pipeline=5"])
    whole = parameter_count(config.model, VOCABULARY)
    assert rank_parameters(load_config(EXAMPLE), VOCABULARY) == [whole]
    assert sum(rank_parameters(config, VOCABULARY)) == whole + VOCABULARY * 1536


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
