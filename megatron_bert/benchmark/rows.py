"""Micro-batches of a corpus' rows, for measurements of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from _megatron_bert_core import RowPlan

from megatron_bert.benchmark.synthetic import CLS, PAD, SEP, Corpora, make_assembler
from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.schema import MlmConfig
from megatron_bert.data.batch import Batch, RowArrays


def make_batches(
    corpora: Corpora,
    mlm: MlmConfig,
    seq_length: int,
    rows: int,
    numbers: range,
    of: int,
    *,
    pinned: bool,
) -> list[Batch]:
    """Assemble some of the micro-batches of a step, deterministically.

    Args:
        corpora: where the rows come from.
        mlm: how they are masked.
        seq_length: slots of a row.
        rows: of a micro-batch.
        numbers: numbers of the micro-batches within the step.
        of: number of micro-batches of the step.
        pinned: whether to use pinned memory, which a GPU can copy from.
    """
    datasets = corpora.open()
    plan = RowPlan(datasets, corpora.weights, [(seq_length, rows * of)], seed=0)
    assembler = make_assembler(corpora, datasets, plan, mlm, 1)
    slots = masked_slots(mlm.probability, mlm.unit, seq_length)
    batches = []
    for number in numbers:
        rows_B = np.arange(number * rows, (number + 1) * rows)
        arrays = RowArrays.empty(rows, seq_length, slots, pin_memory=pinned)
        arrays.rows_B.numpy()[:] = rows_B
        written = [tensor.numpy() for tensor in arrays.model_inputs()[:-1]]
        batches.append(Batch.of(arrays, assembler.fill(rows_B, *written)))
    return batches


def keys_per_query(batches: Sequence[Batch]) -> float:
    """Mean length of the segment that a slot belongs to."""
    squares = slots = 0
    for batch in batches:
        positions = batch.positions_BS.numpy().reshape(-1)
        begins = np.flatnonzero(positions == 0)
        lengths = np.diff(np.append(begins, len(positions))).astype(np.int64)
        squares += int((lengths * lengths).sum())
        slots += len(positions)
    return squares / max(1, slots)


def text_tokens(batches: Sequence[Batch]) -> int:
    """Number of slots with text: no padding, CLS or SEP (nor a token masked by one of these)."""
    no_text = torch.tensor([PAD, CLS, SEP], dtype=torch.int32)
    return sum(int((~torch.isin(batch.tokens_BS, no_text)).sum()) for batch in batches)
