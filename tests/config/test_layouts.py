"""Layouts that cannot be are refused with those that can; all that can are found."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from megatron_bert.config.checks import check_config
from megatron_bert.config.layout_checks import legal_layouts
from megatron_bert.config.load import load_config
from megatron_bert.config.rank_layout import RankLayout
from megatron_bert.errors import ConfigError
from tests.config.conftest import Build, refusal

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "retrievabert_1.3b.yaml"


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["parallel.tensor=3"],
            3,
            "parallel.tensor = 3: does not divide model.num_attention_heads",
        ),
        (["parallel.tensor=4"], 6, "does not divide the 6 ranks of this job; start 4 or 8 ranks"),
        (["parallel.tensor=4"], 1026, "does not divide the 1,026 ranks of this job; start 1024 or"),
        (["parallel.tensor=2"], 1, "start 2 ranks, or choose a product of 1"),
        (
            ["parallel.replicate=3"],
            8,
            "parallel.replicate = 3: does not divide the 8 data-parallel ranks; use 1, 2, 4 or 8",
        ),
        (
            [],
            9,
            "batch.global_size = 8: fewer than the 9 data-parallel ranks, which need a row each; "
            "use at least 9 rows, or at most 8 ranks; no layout of 9 ranks works; start "
            "8 (parallel.tensor=1 parallel.pipeline=1) or "
            "10 (parallel.tensor=1 parallel.pipeline=2) ranks",
        ),
        (
            ["curriculum.1.batch.global_size=2"],
            4,
            "curriculum.1.batch.global_size = 2: fewer than the 4 data-parallel ranks, which need",
        ),
        (
            ["parallel.pipeline=4"],
            4,
            "parallel.pipeline = 4: 4 stages, more than model.num_layers = 2 blocks, of which "
            "each holds one at least; use parallel.pipeline=2 or less",
        ),
        (
            [
                "model.num_layers=12",
                "parallel.pipeline=4",
                "parallel.pipeline_schedule=interleaved",
                "parallel.virtual_stages=4",
            ],
            4,
            "parallel.pipeline = 4 x parallel.virtual_stages = 4: 16 stages, more than "
            "model.num_layers = 12 blocks, of which each holds one at least; use "
            "parallel.pipeline=3 or less, parallel.virtual_stages=3 or "
            "parallel.pipeline_schedule=1f1b",
        ),
        (
            ["parallel.tensor=4", "parallel.sequence=true", "curriculum.1.seq_length=66"],
            4,
            "curriculum.1.seq_length = 66: not divisible by parallel.tensor = 4, over which "
            "parallel.sequence shares the tokens; use 64 or 68, or parallel.sequence=false",
        ),
        (
            [
                "parallel.tensor=4",
                "parallel.sequence=true",
                "eval.fixed_seq_length=30",
                "data.held_out_fraction=0.1",
            ],
            4,
            "eval.fixed_seq_length = 30: not divisible by parallel.tensor = 4",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused(
    build: Build, overrides: list[str], world_size: int, message: str
) -> None:
    assert message in refusal(build, *overrides, world_size=world_size)


def test_the_tensor_parallel_sizes_offered_divide_the_heads(build: Build) -> None:
    shape = ["model.num_attention_heads=24", "model.hidden_size=96", "model.ffn_hidden_size=240"]
    message = refusal(build, *shape, "parallel.tensor=5", world_size=5)
    assert "model.num_attention_heads = 24; use 2, 3, 4, 6, 8 or 12" in message


def test_a_known_vocabulary_must_divide_among_tensor_parallel_ranks(build: Build) -> None:
    config = build("parallel.tensor=4")
    check_config(config, world_size=4)
    check_config(config, world_size=4, vocab_size=128)
    with pytest.raises(ConfigError, match=r"does not divide model\.vocab_size = 130"):
        check_config(config, world_size=4, vocab_size=130)


def test_ranks_that_do_not_divide_the_batch_are_fine(build: Build) -> None:
    check_config(build(), world_size=3)


def test_only_the_sizes_that_a_stage_uses_must_hold_the_ranks(build: Build) -> None:
    own = [f"curriculum.{stage}.batch.global_size=16" for stage in range(3)]
    check_config(build("batch.global_size=2", *own), world_size=16)


@pytest.mark.parametrize(
    ("overrides", "world_size", "layouts"),
    [
        (
            ["parallel.tensor=3"],
            4,
            "layouts of 4 ranks that work, the nearest: parallel.tensor=4 parallel.pipeline=1; "
            "parallel.tensor=2 parallel.pipeline=1; parallel.tensor=1 parallel.pipeline=1",
        ),
        (
            ["parallel.tensor=2", "parallel.pipeline=3", "parallel.replicate=2"],
            2,
            "layouts of 2 ranks that work: parallel.tensor=1 parallel.pipeline=1; "
            "parallel.tensor=1 parallel.pipeline=2 parallel.replicate=1; "
            "parallel.tensor=2 parallel.pipeline=1 parallel.replicate=1",
        ),
        (
            ["parallel.tensor=8", "parallel.pipeline=2"],
            7,
            "layouts of 7 ranks that work: parallel.tensor=1 parallel.pipeline=1",
        ),
        (
            ["batch.global_size=1"],
            7,
            "no layout of 7 ranks works; start 4 (parallel.tensor=2 parallel.pipeline=2) or "
            "8 (parallel.tensor=4 parallel.pipeline=2) ranks",
        ),
        (
            ["batch.global_size=1"],
            9,
            "no layout of 9 ranks works; start 8 (parallel.tensor=4 parallel.pipeline=2) ranks",
        ),
    ],
)
def test_a_refusal_ends_with_the_nearest_layouts_that_work(
    build: Build, overrides: list[str], world_size: int, layouts: str
) -> None:
    message = refusal(build, *overrides, world_size=world_size)
    assert message.endswith(f"; {layouts}")


def test_layouts_are_named_once_for_several_contradictions(build: Build) -> None:
    message = refusal(build, "parallel.tensor=3", "parallel.pipeline=4", world_size=4)
    lines = message.splitlines()
    assert lines[0] == "4 problems in the configuration:"
    assert ["layouts of 4 ranks" in line for line in lines[1:]] == [False, False, False, True]


def test_sequence_parallelism_asks_nothing_of_lengths_that_are_not_evaluated(build: Build) -> None:
    keys = ["parallel.tensor=4", "parallel.sequence=true", "eval.fixed_seq_length=30"]
    check_config(build(*keys), world_size=4)


def test_sequence_parallelism_without_tensor_parallelism_has_no_effect(build: Build) -> None:
    check_config(build("parallel.sequence=true", "curriculum.1.seq_length=33"), world_size=2)


def is_legal(build: Build, *overrides: str, world_size: int) -> bool:
    try:
        check_config(build(*overrides), world_size=world_size, vocab_size=384)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("world_size", [1, 6, 8])
@pytest.mark.parametrize(
    "schedule",
    [
        ["parallel.pipeline_schedule=interleaved"],
        # A pipeline of one rank has another schedule, which takes recomputation.
        ["parallel.pipeline_schedule=zero_bubble", "recompute=full"],
    ],
)
def test_exactly_the_layouts_that_are_not_refused_are_found(
    build: Build, world_size: int, schedule: list[str]
) -> None:
    shape = ["model.num_layers=4", "model.num_attention_heads=12", "model.num_query_groups=3"]
    widths = ["model.hidden_size=96", "model.ffn_hidden_size=48", "batch.global_size=4"]
    lengths = ["curriculum=[{seq_length: 32, steps: 1}]", "parallel.sequence=true"]
    own = [*shape, *widths, *lengths, *schedule]
    found = legal_layouts(build(*own), world_size, vocab_size=384)
    expected = {
        RankLayout(tensor, pipeline, replicate)
        for tensor, pipeline, replicate in itertools.product(range(1, world_size + 1), repeat=3)
        if is_legal(
            build,
            *own,
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.replicate={replicate}",
            world_size=world_size,
        )
    }
    assert set(found) == expected
    assert len(found) == len(expected)


def test_4096_ranks_are_laid_out_in_every_way_within_a_second() -> None:
    config = load_config(EXAMPLE, ["batch.global_size=4096", "parallel.sequence=true"])
    begin = time.process_time()
    found = legal_layouts(config, 4096, vocab_size=99_584)
    assert time.process_time() - begin < 1
    sizes = {(layout.tensor, layout.pipeline) for layout in found}
    assert sizes == set(itertools.product([1, 2, 4, 8], [1, 2, 4, 8, 16, 32]))
