from __future__ import annotations

from pathlib import Path

import pytest
from _megatron_bert_core import MAX_UNIT_TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.config import schema
from megatron_bert.config.arithmetic import (
    LARGEST_OVERRUN,
    computed_lengths,
    fixed_eval_length,
    masked_slots,
    warmup_steps,
)
from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.checks import check_config
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.load import load_config
from megatron_bert.config.parameters import parameter_count
from megatron_bert.config.schema import BatchConfig, Config, ModelConfig
from megatron_bert.errors import ConfigError
from tests.config.conftest import Build

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "retrievabert_1.3b.yaml"
SMALL_INTEGERS = st.integers(1, 200)


def _warmup(config: Config) -> int:
    return warmup_steps(config.schedule, Curriculum(config).total_steps)


@pytest.fixture(scope="module")
def retrievabert() -> Config:
    return load_config(EXAMPLE)


def test_the_published_run_has_its_parameters_steps_and_slots(retrievabert: Config) -> None:
    model = retrievabert.model
    assert model.vocab_size is not None
    assert parameter_count(model, model.vocab_size) == 1_301_388_032
    assert Curriculum(retrievabert).total_steps == 454_000
    assert Curriculum(retrievabert).total_slots == 187_301_888_000
    assert _warmup(retrievabert) == 4_540


def test_the_published_run_fits_4_to_32_ranks_and_tensor_parallelism() -> None:
    for world_size in (1, 4, 8, 24, 32):
        check_config(load_config(EXAMPLE), world_size=world_size)
    check_config(load_config(EXAMPLE, ["parallel.tensor=8"]), world_size=32)


@pytest.mark.parametrize("world_size", [1, 4, 8, 32])
def test_the_example_of_modernbert_fits_1_to_32_ranks(world_size: int) -> None:
    config = load_config(EXAMPLE.with_name("modernbert_base.yaml"))
    assert config.model.family.rotary
    assert [config.model.is_local(layer) for layer in range(4)] == [False, True, True, False]
    check_config(config, world_size=world_size)


def test_the_preset_says_what_the_published_run_spells_out(retrievabert: Config) -> None:
    assert ModelConfig(preset="retrievabert-1.3b") == retrievabert.model  # type: ignore[call-arg]


def test_the_published_masking_hides_15_percent_in_ngrams_up_to_3(retrievabert: Config) -> None:
    mlm = retrievabert.mlm
    assert (mlm.probability, mlm.mask_ratio, mlm.random_ratio) == (0.15, 0.8, 0.1)
    assert (mlm.unit, mlm.max_ngram) == ("ngram", 3)


def test_the_data_core_masks_no_longer_units_than_the_slots_allow_for(build: Build) -> None:
    assert schema.MAX_UNIT_TOKENS == MAX_UNIT_TOKENS == LARGEST_OVERRUN + 1
    assert build(f"mlm.max_ngram={MAX_UNIT_TOKENS}").mlm.max_ngram == MAX_UNIT_TOKENS
    with pytest.raises(ConfigError, match=rf"mlm\.max_ngram = {MAX_UNIT_TOKENS + 1}"):
        build(f"mlm.max_ngram={MAX_UNIT_TOKENS + 1}")


def test_masked_slots_round_half_up_and_leave_room_for_an_overrun() -> None:
    assert masked_slots(0.15, "token", 128) == 19
    assert masked_slots(0.15, "token", 12) == 2
    assert masked_slots(0.01, "token", 8) == 1
    assert masked_slots(0.15, "ngram", 128) == 26


def test_warmup_is_a_share_of_all_steps_or_a_number_of_them(build: Build) -> None:
    assert _warmup(build()) == 4
    assert _warmup(build("schedule.warmup_fraction=0.1")) == 35
    assert _warmup(build("schedule.warmup_steps=0")) == 0


def test_the_fixed_evaluation_length_is_at_most_512_unless_it_is_set(
    build: Build, retrievabert: Config
) -> None:
    assert fixed_eval_length(retrievabert) == 512
    assert fixed_eval_length(build()) == 128
    assert fixed_eval_length(build("eval.fixed_seq_length=64")) == 64


def test_a_length_of_evaluation_is_computed_where_text_is_held_out(build: Build) -> None:
    stages = {f"curriculum.{index}.seq_length": 32 * 2**index for index in range(3)}
    given, valid, part = (
        "eval.fixed_seq_length=48", "data.valid=[{prefix: v}]", "data.held_out_fraction=0.1"
    )  # fmt: skip
    assert computed_lengths(build(given)) == stages
    assert computed_lengths(build(valid)) == stages
    for held_out in (valid, part):
        lengths = computed_lengths(build(given, held_out))
        assert lengths == {**stages, "eval.fixed_seq_length": 48}


def test_micro_batches_hold_micro_tokens_but_at_least_one_row() -> None:
    batch = BatchConfig(global_size=64)
    assert [batch.max_micro_rows(length) for length in (128, 2048, 20000)] == [128, 8, 1]
    assert BatchConfig(global_size=64, micro_size=5).max_micro_rows(2048) == 5


def test_micro_batches_are_as_few_as_possible_and_balanced() -> None:
    layout = BatchLayout.divide(27, 3, 8)
    assert (layout.micro_size, layout.num_micro_batches) == (5, 2)
    assert (layout.rows_per_rank, layout.surplus_rows) == (10, 3)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(rows=SMALL_INTEGERS, ranks=SMALL_INTEGERS, limit=SMALL_INTEGERS)
def test_every_row_of_the_batch_is_taken_by_exactly_one_rank(
    rows: int, ranks: int, limit: int
) -> None:
    layout = BatchLayout.divide(rows, ranks, limit)
    taken = [
        offset
        for rank in range(ranks)
        for micro_batch in range(layout.num_micro_batches)
        for offset in layout.row_offsets(rank, micro_batch)
    ]
    assert sorted(taken) == list(range(rows + layout.surplus_rows))
    assert layout.micro_size <= limit
    assert 0 <= layout.surplus_rows < ranks * layout.num_micro_batches + ranks


@settings(max_examples=100, derandomize=True, deadline=None)
@given(rows=SMALL_INTEGERS, ranks=SMALL_INTEGERS, limit=SMALL_INTEGERS)
def test_ranks_differ_by_at_most_one_real_row_per_step(rows: int, ranks: int, limit: int) -> None:
    layout = BatchLayout.divide(rows, ranks, limit)
    real = [
        sum(
            offset < rows
            for micro_batch in range(layout.num_micro_batches)
            for offset in layout.row_offsets(rank, micro_batch)
        )
        for rank in range(ranks)
    ]
    assert max(real) - min(real) <= 1
