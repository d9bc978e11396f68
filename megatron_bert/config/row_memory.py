"""How much memory rows take: the rows of a step, and the plan of a whole run's rows.

It serves to refuse a size with a few zeros too many before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.config.curriculum import Curriculum, StageSpan
from megatron_bert.config.schema import Config
from megatron_bert.host import usable_memory
from megatron_bert.words import counted

# The training loop assembles a step's rows while it reads those of the previous step.
_STEPS_HELD = 2
# Sizes in the data core's plan (csrc/row_plan.h, csrc/blend.h): a place of 16 bytes for every 64
# rows; if several corpora are blended, for each of them a count of 8 bytes for every 256 rows and
# one of 1 byte for every 32; and each epoch's beginning, including the slack of growing arrays.
_PLACE_BYTES_A_ROW = 16 / 64
_BLEND_BYTES_A_ROW = 8 / 256 + 1 / 32
_EPOCH_BYTES = 300


def room_for_rows() -> int:
    """Bytes that a step's rows, or the plan, may take; the rest is for the model and other uses."""
    return usable_memory() // 2


def plan_bytes(rows: int, corpora: int, epochs: float = 0.0) -> float:
    """Bytes that the plan of a run's rows takes in each process.

    Args:
        rows: number of rows of the whole run.
        corpora: number of corpora that are blended.
        epochs: number of epochs, summed over all corpora.
    """
    blend = _BLEND_BYTES_A_ROW * corpora if corpora > 1 else 0.0
    return rows * (_PLACE_BYTES_A_ROW + blend) + epochs * _EPOCH_BYTES


def long_run(config: Config) -> str:
    """The key that makes a run long, and the number of rows that it leads to, for messages."""
    spans = Curriculum(config).spans
    longest = max(spans, key=lambda span: span.num_rows)
    return (
        f"curriculum.{longest.index}.steps = {longest.num_steps}: with steps of "
        f"{counted(longest.global_size, 'row')} the run has "
        f"{counted(sum(span.num_rows for span in spans), 'row')}"
    )


def row_problems(config: Config, world_size: int) -> Iterator[str]:
    """Problems of steps or runs with more rows than this machine could hold, whatever the data."""
    step_problems = list(_step_problems(config, world_size))
    yield from step_problems
    if not step_problems:
        yield from _plan_problems(config)


def _step_problems(config: Config, world_size: int) -> Iterator[str]:
    room = room_for_rows()
    data_parallel = max(1, world_size // (config.parallel.tensor * config.parallel.pipeline))
    # Of stages that share a key, the one with the largest rows counts.
    largest: dict[str, StageSpan] = {}
    for span, stage in zip(Curriculum(config).spans, config.curriculum, strict=True):
        own = stage.batch.global_size is not None
        key = f"curriculum.{span.index}.batch.global_size" if own else "batch.global_size"
        largest[key] = max(largest.get(key, span), span, key=_row_bytes)
    for key, span in largest.items():
        rows, row_bytes = ceil_div(span.global_size, data_parallel), _STEPS_HELD * _row_bytes(span)
        if rows * row_bytes > room:
            yield (
                f"{key} = {span.global_size}: a rank's {counted(rows, 'row')} of "
                f"{span.seq_length} slots need {gigabytes(rows * row_bytes)} of memory, those of "
                f"{_STEPS_HELD} steps at a time, and half of this job's is {gigabytes(room)}; "
                f"use at most {room // row_bytes * data_parallel}"
            )


def _row_bytes(span: StageSpan) -> int:
    """Bytes of a row: tokens and positions, masked slots, labels and weights, and its number."""
    return 2 * 4 * span.seq_length + 3 * 4 * span.masked_slots + 8


def _plan_problems(config: Config) -> Iterator[str]:
    room, corpora = room_for_rows(), len(config.data.train)
    spans = Curriculum(config).spans
    rows = sum(span.num_rows for span in spans)
    if plan_bytes(rows, corpora) <= room:
        return
    longest = max(spans, key=lambda span: span.num_rows)
    other_rows = rows - longest.num_rows
    most_rows = int(room / plan_bytes(1, corpora)) - other_rows
    yield (
        f"{long_run(config)}, whose plan needs {gigabytes(plan_bytes(rows, corpora))} of memory in "
        f"each process, and half of this job's is {gigabytes(room)}; use at most "
        f"{max(1, most_rows // longest.global_size)}"
    )


def gigabytes(amount: float) -> str:
    """Bytes in the form used in messages."""
    return f"{amount / 1e9:,.1f} GB"
