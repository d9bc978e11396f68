"""Sizes that follow from the configuration: steps, masked slots, vocabulary."""

from __future__ import annotations

import math

from megatron_bert.config.schema import (
    DEFAULT_WARMUP_FRACTION,
    MAX_UNIT_TOKENS,
    Config,
    MaskUnit,
    ModelConfig,
    ScheduleConfig,
)
from megatron_bert.errors import ConfigError

VOCABULARY_MULTIPLE = 128
LONGEST_DEFAULT_EVAL = 512
# Words and spans are masked whole, so the last one may exceed the limit by all but one token.
LARGEST_OVERRUN = MAX_UNIT_TOKENS - 1


def masked_slots(probability: float, unit: MaskUnit, seq_length: int) -> int:
    """Masked slots M of a row of `seq_length` slots; a fixed number, so that shapes are fixed.

    A row holds at most `seq_length - 2` text tokens; the share `probability` of them is rounded
    half up. Units of several tokens may exceed it by `LARGEST_OVERRUN`.
    """
    exact = max(1, math.floor(probability * (seq_length - 2) + 0.5))
    return exact if unit == "token" else exact + LARGEST_OVERRUN


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps of linear warm-up, from `schedule.warmup_steps` or the fraction of all steps."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    fraction = schedule.warmup_fraction
    fraction = DEFAULT_WARMUP_FRACTION if fraction is None else fraction
    return math.floor(fraction * total_steps + 0.5)


def fixed_eval_length(config: Config) -> int:
    """Length that is evaluated in every stage, in slots: as configured, or else at most 512."""
    if config.eval.fixed_seq_length is not None:
        return config.eval.fixed_seq_length
    return min(LONGEST_DEFAULT_EVAL, max(stage.seq_length for stage in config.curriculum))


def computed_lengths(config: Config) -> dict[str, int]:
    """Every length that is trained or evaluated, in slots, by its key.

    The default evaluation length is left out if a stage has that length anyway.
    """
    lengths = {
        f"curriculum.{index}.seq_length": stage.seq_length
        for index, stage in enumerate(config.curriculum)
    }
    if config.data.valid or config.data.held_out_fraction:
        fixed = fixed_eval_length(config)
        if config.eval.fixed_seq_length is not None or fixed not in lengths.values():
            lengths["eval.fixed_seq_length"] = fixed
    return lengths


def resolve_vocab_size(model: ModelConfig, tokenizer_pieces: int) -> int:
    """Rows of the embedding table.

    Their number is never padded to suit the ranks that share the table: the model would then depend
    on the layout.

    Args:
        model: Its `vocab_size` is taken where it is set.
        tokenizer_pieces: Pieces of the tokenizer.

    Returns:
        The rows: `model.vocab_size`, or the pieces padded to a multiple of 128.

    Raises:
        ConfigError: The set size is smaller than the tokenizer.
    """
    padded = next_multiple(tokenizer_pieces, VOCABULARY_MULTIPLE)
    size = padded if model.vocab_size is None else model.vocab_size
    if size < tokenizer_pieces:
        raise ConfigError(
            f"model.vocab_size = {size}: the tokenizer has {tokenizer_pieces} pieces; "
            f"use {padded}, or null to follow the tokenizer"
        )
    return size


def ceil_div(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up: how many parts of at most `divisor` cover `number`."""
    return -(-number // divisor)


def next_multiple(value: int, factor: int) -> int:
    """The smallest multiple of `factor` that is no smaller than `value`."""
    return ceil_div(value, factor) * factor
