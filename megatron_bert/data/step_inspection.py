"""The rows that a run's steps read: their hash, and their text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_bert.command_line.arguments import argument
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch, RowArrays
from megatron_bert.data.source import training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError

# Bounds the memory for inspecting a step, whatever its global batch size.
_SLOTS_AT_A_TIME = 1 << 20

_Item = TypeVar("_Item")


class StepBatches:
    """The rows that steps read, assembled as in training.

    Args:
        config: of the run.
        first_step: counted from 1.
        last_step: inclusive.

    Raises:
        DataError: the steps are not in the run, or its data cannot be read.
    """

    def __init__(self, config: Config, first_step: int, last_step: int) -> None:
        self._curriculum = Curriculum(config)
        total = self._curriculum.total_steps
        if first_step == last_step and not 1 <= first_step <= total:
            raise DataError(
                f"{argument('step')} = {first_step}: the run has {total} steps; give one of 1 to "
                f"{total}"
            )
        if not 1 <= first_step <= last_step <= total:
            raise DataError(
                f"steps {first_step}:{last_step} do not lie in the run, whose steps are "
                f"1:{total}; give two of those, the smaller one first"
            )
        self.steps = range(first_step, last_step + 1)
        self.tokenizer = Tokenizer.load(config.data.tokenizer)
        self._source = training_source(config, self.tokenizer)
        self._source.check_unchanged()  # planning a large corpus takes a while

    def stage(self, step: int) -> int:
        """The stage, from 0, that a step belongs to."""
        return self._curriculum.at(step).index

    def rows(self, step: int) -> range:
        """The numbers of the rows that a step reads."""
        return self._curriculum.at(step).rows_of(step)

    def batches(self, step: int) -> Iterator[Batch]:
        """Yield a step's rows in order, in batches small enough to bound the memory."""
        span, rows = self._curriculum.at(step), self.rows(step)
        rows_at_a_time = max(1, _SLOTS_AT_A_TIME // span.seq_length)
        for first in rows[::rows_at_a_time]:
            rows_B = np.arange(first, min(rows.stop, first + rows_at_a_time), dtype=np.int64)
            yield self._source.batch(rows_B, span.index)

    def described(
        self, step: int, of_batch: Callable[[Batch], Iterable[_Item]]
    ) -> Iterator[_Item | str]:
        """Yield what `of_batch` yields for each batch, then `step K stage I batch_hash H`."""
        batch_hash = 0
        for batch in self.batches(step):
            batch_hash = (batch_hash + batch.batch_hash) % 2**64
            yield from of_batch(batch)
        yield f"step {step} stage {self.stage(step)} batch_hash {batch_hash:016x}"


def describe_steps(
    config: Config, first_step: int, last_step: int, *, with_text: bool = False
) -> Iterator[str]:
    """Yield for each step, both ends included, the line `step K stage I batch_hash H`.

    Steps count from 1, stages from 0, the hash has 16 hex digits: the values that training writes
    into `metrics.jsonl`. With text, a line for each of the step's rows comes before it.

    Raises:
        DataError: the steps are not in the run, or its data cannot be read.
    """
    inspected = StepBatches(config, first_step, last_step)

    def texts(batch: Batch) -> Iterable[str]:
        return _row_texts(batch, inspected.tokenizer) if with_text else ()

    for step in inspected.steps:
        yield from inspected.described(step, texts)


def unmasked(batch: RowArrays) -> npt.NDArray[np.int32]:
    """The tokens of rows before masking, [B, S]."""
    tokens_BS = batch.tokens_BS.numpy().copy()
    used_BM = batch.weights_BM.numpy() > 0.0
    rows_N = np.nonzero(used_BM)[0]
    tokens_BS[rows_N, batch.masked_BM.numpy()[used_BM]] = batch.labels_BM.numpy()[used_BM]
    return tokens_BS


def _row_texts(batch: Batch, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a line for each row: its number, its count of masked tokens, its unmasked segments."""
    for row, positions_S, weights_M, tokens_S in zip(
        batch.rows_B.tolist(),
        batch.positions_BS.numpy(),
        batch.weights_BM.numpy(),
        unmasked(batch),
        strict=True,
    ):
        segments = np.split(tokens_S, np.flatnonzero(positions_S == 0)[1:])
        # Padding, a segment of its own, has no text.
        texts = [repr(text) for ids in segments if (text := tokenizer.decode(ids.tolist()))]
        yield f"row {row} ({int((weights_M > 0.0).sum())} masked): {' | '.join(texts)}"
