from __future__ import annotations

import random

from megatron_bert.training.spikes import SpikeWatch


def _spikes(losses: list[float], stage: int = 0, watch: SpikeWatch | None = None) -> list[int]:
    watch = watch or SpikeWatch()
    limits = [watch.limit_exceeded(loss, stage) for loss in losses]
    return [number for number, limit in enumerate(limits) if limit is not None]


def test_a_loss_far_above_the_last_ones_is_a_spike_and_noise_is_none() -> None:
    draw = random.Random(1)
    losses = [8.0 - 0.005 * step + draw.gauss(0.0, 0.05) for step in range(1000)]
    assert _spikes(losses) == []
    losses[500] += 1.5
    losses[503] += 1.5  # the spike before does not hide it
    assert _spikes(losses) == [500, 503]


def test_losses_that_hardly_vary_need_a_tenth_of_a_nat() -> None:
    assert _spikes([2.0] * 50 + [2.09, 2.11]) == [51]


def test_the_first_steps_of_a_stage_are_compared_with_none() -> None:
    watch = SpikeWatch()
    assert _spikes([2.0] * 50, 0, watch) == []
    assert _spikes([4.0] * 20 + [9.0], 1, watch) == [20]


def test_a_new_level_of_the_loss_is_told_until_it_is_the_usual_one() -> None:
    spikes = _spikes([2.0] * 100 + [3.0] * 200)
    assert spikes == list(range(100, 100 + len(spikes)))
    assert len(spikes) <= 51
