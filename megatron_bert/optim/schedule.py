"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megatron_bert.config.arithmetic import warmup_steps
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config, OptimizerConfig, ScheduleConfig


def learning_rate(step: int, config: Config, curriculum: Curriculum) -> float:
    """Return the learning rate of a step.

    It rises linearly from 0 over the warm-up, whose last step has the peak, and then follows
    `schedule.decay` so that the run's last step has `min_lr` (`constant` stays at the peak). The
    result is multiplied by the `lr_factor` of the curriculum stage.

    Args:
        step: 1-based number of the step about to be taken.
        config: The whole configuration.
        curriculum: Its stages, which give the run's length and their factors.
    """
    scheduled = _scheduled(step, config.optimizer, config.schedule, curriculum.total_steps)
    return curriculum.at(step).lr_factor * scheduled


def _scheduled(
    step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig, total: int
) -> float:
    warmup = warmup_steps(schedule, total)
    if step <= warmup:
        return optimizer.lr * step / warmup
    remaining = _remaining(step, warmup, total, schedule)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * remaining


def _remaining(step: int, warmup: int, total: int, schedule: ScheduleConfig) -> float:
    """Share of the way from minimum to peak, 1 after the warm-up and 0 at the last step."""
    match schedule.decay:
        case "constant":
            return 1.0
        case "linear":
            return (total - step) / (total - warmup)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        case "wsd":
            decay = max(1, round(schedule.wsd_decay_fraction * total))
            return min(1.0, (total - step) / decay)
