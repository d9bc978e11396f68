"""Assembling rows, from a random row number to tokens, mask and labels: speed on one core."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from _megatron_bert_core import BatchAssembler, RowPlan
from numpy.typing import NDArray

from megatron_bert.benchmark.process import pin_to_one_core
from megatron_bert.benchmark.synthetic import Corpora, make_assembler
from megatron_bert.benchmark.timing import time_in_turns
from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.schema import MlmConfig

ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class AssembleWork:
    """What to assemble.

    Attributes:
        corpora: blended in every stage.
        seq_lengths: row lengths of the plan's stages; each stage has about as many slots as the
            corpora have tokens.
        mlm: how rows are masked.
        repetitions: how often every row of every stage is assembled, in random order.
    """

    corpora: Corpora
    seq_lengths: Sequence[int]
    mlm: MlmConfig
    repetitions: int


@dataclass(frozen=True)
class AssembleFigures:
    """Token slots assembled per second at one row length, on one core.

    Attributes:
        tokens_per_second_per_core: in the shortest repetition.
        median_tokens_per_second_per_core: in the median repetition.
        rows: rows of each repetition.
        core_share: share of the time in which the core worked on it; below 1 if other processes
            took the core, and then all figures are too low.
    """

    tokens_per_second_per_core: int
    median_tokens_per_second_per_core: int
    rows: int
    core_share: float


class RowBuffers:
    """Arrays of one batch: B rows of S slots, of which M are masked."""

    def __init__(self, mlm: MlmConfig, seq_length: int) -> None:
        shape_BM = (ROWS_AT_A_TIME, masked_slots(mlm.probability, mlm.unit, seq_length))
        self._tokens_BS = np.empty((ROWS_AT_A_TIME, seq_length), dtype=np.int32)
        self._positions_BS = np.empty_like(self._tokens_BS)
        self._masked_BM = np.empty(shape_BM, dtype=np.int32)
        self._labels_BM = np.empty_like(self._masked_BM)
        self._weights_BM = np.empty(shape_BM, dtype=np.float32)

    def fill(self, assembler: BatchAssembler, rows_B: NDArray[np.int64]) -> None:
        """Assemble the rows with these numbers."""
        assembler.fill(
            rows_B,
            self._tokens_BS,
            self._positions_BS,
            self._masked_BM,
            self._labels_BM,
            self._weights_BM,
        )


def equal_stages(tokens: int, seq_lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Stages of about `tokens` slots each, in whole batches of rows."""
    return [
        (length, max(1, tokens // (length * ROWS_AT_A_TIME)) * ROWS_AT_A_TIME)
        for length in seq_lengths
    ]


def measure_assembly(work: AssembleWork) -> dict[int, AssembleFigures]:
    """Assemble in this process, which is pinned to one core from then on.

    Rows are requested in an order that is random over the whole stage. That is harder than
    training's order, which goes through windows of rows.

    Returns:
        Figures by row length.
    """
    pin_to_one_core()
    datasets = work.corpora.open()
    stages = equal_stages(sum(dataset.num_tokens for dataset in datasets), work.seq_lengths)
    plan = RowPlan(datasets, work.corpora.weights, stages, seed=0)
    assembler = make_assembler(work.corpora, datasets, plan, work.mlm, len(stages))
    figures = {}
    first_row = 0
    for seq_length, rows in stages:
        numbers = np.arange(first_row, first_row + rows)
        assemble = _pass_over(assembler, RowBuffers(work.mlm, seq_length), numbers)
        # Once beforehand, because the first access to a page of the mapped file costs a fault.
        assemble()
        begin = time.process_time()
        (timing,) = time_in_turns([assemble], work.repetitions)
        core_seconds = time.process_time() - begin
        slots = rows * seq_length
        figures[seq_length] = AssembleFigures(
            tokens_per_second_per_core=round(slots / timing.best),
            median_tokens_per_second_per_core=round(slots / timing.median),
            rows=rows,
            core_share=round(core_seconds / sum(timing.seconds), 3),
        )
        first_row += rows
    return figures


def _pass_over(
    assembler: BatchAssembler, buffers: RowBuffers, numbers: NDArray[np.int64]
) -> Callable[[], None]:
    shuffled = np.random.default_rng(0).permutation(numbers).reshape(-1, ROWS_AT_A_TIME)

    def assemble() -> None:
        for rows_B in shuffled:
            buffers.fill(assembler, rows_B)

    return assemble
