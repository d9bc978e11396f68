from __future__ import annotations

import pytest

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config
from tests.config.conftest import Build

OWN = (
    "curriculum.0.batch.global_size=4",
    "curriculum.1.mlm.probability=0.3",
    "curriculum.2.lr_factor=0.5",
)


@pytest.fixture
def config(build: Build) -> Config:
    """Stages of 100, 200 and 50 steps, with 4, 8 and 8 rows of 32, 64 and 128 slots."""
    return build(*OWN)


def test_a_stage_takes_from_the_run_what_it_does_not_set_itself(config: Config) -> None:
    spans = Curriculum(config).spans
    assert [span.global_size for span in spans] == [4, 8, 8]
    assert [span.probability for span in spans] == [0.15, 0.3, 0.15]
    assert [span.lr_factor for span in spans] == [1.0, 1.0, 0.5]
    assert [span.masked_slots for span in spans] == [5, 19, 19]


def test_stages_follow_each_other_in_steps_and_in_rows(config: Config) -> None:
    curriculum = Curriculum(config)
    assert [(span.first_step, span.last_step) for span in curriculum.spans] == [
        (1, 100),
        (101, 300),
        (301, 350),
    ]
    assert [(span.first_row, span.num_rows) for span in curriculum.spans] == [
        (0, 400),
        (400, 1600),
        (2000, 400),
    ]


def test_every_row_is_read_by_exactly_one_step(config: Config) -> None:
    curriculum = Curriculum(config)
    rows = [
        row
        for step in range(1, curriculum.total_steps + 1)
        for row in curriculum.at(step).rows_of(step)
    ]
    assert rows == list(range(2400))


@pytest.mark.parametrize(
    ("step", "rows", "slots"),
    [
        (0, 0, 0),
        (1, 4, 4 * 32),
        (100, 400, 400 * 32),
        (101, 408, 400 * 32 + 8 * 64),
        (350, 2400, 400 * 32 + 1600 * 64 + 400 * 128),
    ],
)
def test_rows_and_slots_are_counted_over_all_stages(
    config: Config, step: int, rows: int, slots: int
) -> None:
    curriculum = Curriculum(config)
    assert curriculum.rows_until(step) == rows
    assert curriculum.slots_until(step) == slots


def test_lengthening_a_stage_leaves_the_rows_of_the_steps_before_as_they_were(
    config: Config, build: Build
) -> None:
    longer = build(*OWN, "curriculum.1.steps=500")
    before, after = Curriculum(config), Curriculum(longer)
    for step in range(1, 301):
        assert after.at(step).rows_of(step) == before.at(step).rows_of(step)
    assert after.total_slots == before.total_slots + 300 * 8 * 64
