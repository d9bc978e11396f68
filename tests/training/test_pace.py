from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config
from megatron_bert.training.due import Due
from megatron_bert.training.pace import Pace
from tests.distributed_harness import run_ranks
from tests.small_model import small_config
from tests.training.runs import Stops, train

MARGIN = 1.5


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _pace(
    clock: _Clock,
    *,
    evaluates: bool = False,
    bytes_to_save: int = 0,
    interval: int = 100,
    last_steps: int = 20,
) -> Pace:
    config = small_config(
        curriculum=[{"seq_length": 32, "steps": 20}, {"seq_length": 64, "steps": last_steps}],
        checkpoint={"interval": interval},
        eval={"interval": 4},
    )
    curriculum = Curriculum(config)
    return Pace(
        curriculum,
        Due.of(config, curriculum, evaluates=evaluates),
        evaluation_slots=lambda span: 6 * span.slots_per_step,
        bytes_to_save=bytes_to_save,
        clock=clock,
    )


def _take(pace: Pace, clock: _Clock, seconds: dict[int, float]) -> None:
    """Take steps, the first of them begun already, of so many seconds; begin the next one."""
    for step, duration in seconds.items():
        clock.now += duration
        pace.begin(step + 1)


def test_until_a_save_is_measured_one_is_reckoned_from_its_bytes() -> None:
    clock = _Clock()
    pace = _pace(clock, bytes_to_save=10**9)
    pace.begin(1)
    assert pace.seconds_to_end(None, saving=False) == pytest.approx(MARGIN * 20.0)
    assert pace.seconds_to_end(3.0, saving=False) == pytest.approx(MARGIN * 3.0)


def test_two_steps_as_slow_as_the_slowest_of_the_last_ten_and_a_save_must_fit() -> None:
    clock = _Clock()
    pace = _pace(clock)
    pace.begin(1)
    _take(pace, clock, {1: 9.0, 2: 4.0})
    assert pace.seconds_to_end(5.0, saving=False) == pytest.approx(MARGIN * (2 * 9.0 + 5.0))
    _take(pace, clock, dict.fromkeys(range(3, 12), 1.0))
    assert pace.seconds_to_end(5.0, saving=False) == pytest.approx(MARGIN * (2 * 4.0 + 5.0))
    _take(pace, clock, {12: 1.0})
    assert pace.seconds_to_end(5.0, saving=False) == pytest.approx(MARGIN * (2 * 1.0 + 5.0))


def test_a_step_of_the_next_stage_takes_as_much_longer_as_it_has_slots() -> None:
    clock = _Clock()
    pace = _pace(clock)
    pace.begin(18)
    _take(pace, clock, {18: 1.0})
    assert pace.seconds_to_end(0.0, saving=False) == pytest.approx(MARGIN * 2 * 1.0)
    _take(pace, clock, {19: 1.0})
    assert pace.seconds_to_end(0.0, saving=False) == pytest.approx(MARGIN * 2 * 2.0)


def test_in_the_last_step_no_other_follows() -> None:
    clock = _Clock()
    pace = _pace(clock)
    pace.begin(39)
    _take(pace, clock, {39: 1.0})
    assert pace.seconds_to_end(0.0, saving=False) == pytest.approx(MARGIN * 1.0)


def test_evaluations_and_saves_that_fall_due_are_reckoned_in_and_are_no_part_of_a_step() -> None:
    clock = _Clock()
    pace = _pace(clock, evaluates=True, interval=7)
    pace.begin(2)
    _take(pace, clock, {2: 1.0})
    # Step 4 ends in an evaluation that was never measured: the 6 steps' slots it reads count.
    assert pace.seconds_to_end(10.0, saving=False) == pytest.approx(MARGIN * (2 + 6 + 10))
    with pace.paused(), pace.evaluation():
        clock.now += 30.0
    clock.now += 1.0
    pace.begin(7)  # step 7 is saved, and evaluated is step 8
    assert pace.seconds_to_end(10.0, saving=False) == pytest.approx(MARGIN * (2 + 30 + 2 * 10))
    clock.now += 1.0
    pace.begin(9)
    assert pace.seconds_to_end(10.0, saving=True) == pytest.approx(MARGIN * (2 + 2 * 10))


def test_the_evaluation_after_the_last_step_is_reckoned_in_whatever_its_number() -> None:
    clock = _Clock()
    pace = _pace(clock, evaluates=True, last_steps=18)
    pace.begin(36)
    with pace.paused(), pace.evaluation():
        clock.now += 600.0
    _take(pace, clock, {36: 1.0})
    assert pace.seconds_to_end(10.0, saving=False) == pytest.approx(MARGIN * (2 + 600 + 10))
    _take(pace, clock, {37: 1.0})
    assert pace.seconds_to_end(10.0, saving=False) == pytest.approx(MARGIN * (1 + 600 + 10))


def test_an_evaluation_of_the_next_stage_takes_as_much_longer_as_it_reads() -> None:
    clock = _Clock()
    pace = _pace(clock, evaluates=True)
    pace.begin(20)
    with pace.paused(), pace.evaluation():
        clock.now += 30.0
    _take(pace, clock, dict.fromkeys((20, 21, 22), 1.0))
    assert pace.evaluation_seconds == 30.0
    # Step 20 is measured, of half the slots, and step 24 is evaluated.
    assert pace.seconds_to_end(0.0, saving=False) == pytest.approx(MARGIN * (2 * 2 + 60))


def test_the_save_that_is_due_after_the_second_step_is_the_last_save_itself() -> None:
    clock = _Clock()
    pace = _pace(clock, interval=7)
    pace.begin(6)
    assert pace.seconds_to_end(10.0, saving=False) == pytest.approx(MARGIN * 10)


class _Listening(Stops):
    """Remembers how long the run said that its end would take."""

    def __init__(self) -> None:
        self.told: list[float] = []
        super().__init__()
        self.told.clear()

    @property
    def seconds_to_end(self) -> float:
        return self.told[-1]

    @seconds_to_end.setter
    def seconds_to_end(self, seconds: float) -> None:
        self.told.append(seconds)


def _train_listening(config: Config) -> list[float]:
    stops = _Listening()
    train(config, stops)
    return stops.told


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_tells_before_every_step_how_long_its_end_would_take(
    tiny_run: Callable[..., Config], in_background: bool
) -> None:
    config = tiny_run(checkpoint={"async": in_background}, valid=False)
    for told in run_ranks(2, _train_listening, config):
        assert len(told) == 12
        # The first step knows the bytes of a save only, and this model has few.
        assert 0.0 < told[0] < 0.1 < 1e3 * min(told[1:])
