from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config
from megatron_bert.optim.schedule import learning_rate
from tests.small_model import small_config

STEPS = 100


def _config(**schedule: Any) -> Config:
    return small_config(
        curriculum=[{"seq_length": 32, "steps": 60}, {"seq_length": 64, "steps": STEPS - 60}],
        optimizer={"lr": 1.0, "min_lr": 0.1},
        schedule={"warmup_steps": 10, **schedule},
    )


def _rate(step: int, config: Config) -> float:
    return learning_rate(step, config, Curriculum(config))


@pytest.mark.parametrize("decay", ["linear", "cosine", "wsd", "constant"])
def test_the_warm_up_rises_from_zero_to_the_peak_in_equal_parts(decay: str) -> None:
    config = _config(decay=decay)
    rates = [_rate(step, config) for step in range(1, 11)]
    assert rates == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize("decay", ["linear", "cosine", "wsd"])
def test_a_decay_falls_to_the_minimum_at_the_last_step_of_the_last_stage(decay: str) -> None:
    config = _config(decay=decay)
    rates = [_rate(step, config) for step in range(10, STEPS + 1)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[-2] > 0.1


def test_the_decays_pass_through_the_points_of_their_formulas() -> None:
    middle = 55  # half-way between the warm-up's end and the last step
    assert _rate(middle, _config(decay="linear")) == pytest.approx(0.55)
    assert _rate(middle, _config(decay="cosine")) == pytest.approx(0.55)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3))
    assert _rate(40, _config(decay="cosine")) == pytest.approx(quarter)
    assert _rate(STEPS, _config(decay="constant")) == 1.0


def test_wsd_stays_at_the_peak_until_its_share_of_the_steps_is_left() -> None:
    config = _config(decay="wsd", wsd_decay_fraction=0.2)
    assert _rate(80, config) == 1.0
    assert _rate(81, config) < 1.0
    assert _rate(90, config) == pytest.approx(0.55)


def test_without_a_warm_up_the_first_step_is_already_on_the_decay() -> None:
    config = _config(warmup_steps=0)
    assert _rate(1, config) == pytest.approx(0.1 + 0.9 * 99 / 100)


def test_a_stages_factor_multiplies_what_the_schedule_gives_in_that_stage_alone() -> None:
    plain = _config()
    factor = plain.curriculum[1].model_copy(update={"lr_factor": 0.5})
    scaled = plain.model_copy(update={"curriculum": (plain.curriculum[0], factor)})
    for step in range(1, STEPS + 1):
        expected = _rate(step, plain) * (0.5 if step > 60 else 1.0)
        assert _rate(step, scaled) == pytest.approx(expected)
