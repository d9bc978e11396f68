"""Memory that the data side of a training process holds, without the pages of its mapped files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from _megatron_bert_core import RowPlan

from megatron_bert.benchmark.data.assemble import ROWS_AT_A_TIME, RowBuffers, equal_stages
from megatron_bert.benchmark.process import anonymous_megabytes
from megatron_bert.benchmark.synthetic import Corpora, make_assembler
from megatron_bert.config.schema import MlmConfig


@dataclass(frozen=True)
class MemoryFigures:
    """Anonymous resident memory, in 10^6 bytes.

    Attributes:
        data_mb: added by opening the corpora, planning and a tenth of the batches.
        growth_mb: added by the other batches.
        batches: number of batches assembled.
    """

    data_mb: float
    growth_mb: float
    batches: int


def measure_memory(corpora: Corpora, seq_length: int, batches: int) -> MemoryFigures:
    """Assemble batches, each into new arrays, in this process, which should be new."""
    mlm = MlmConfig()
    before_mb = anonymous_megabytes()
    datasets = corpora.open()
    stages = equal_stages(sum(dataset.num_tokens for dataset in datasets), [seq_length])
    plan = RowPlan(datasets, corpora.weights, stages, seed=0)
    assembler = make_assembler(corpora, datasets, plan, mlm, len(stages))
    warm_mb = before_mb
    for batch in range(batches):
        if batch == batches // 10:
            warm_mb = anonymous_megabytes()
        rows_B = np.arange(batch * ROWS_AT_A_TIME, (batch + 1) * ROWS_AT_A_TIME) % plan.num_rows
        RowBuffers(mlm, seq_length).fill(assembler, rows_B)
    return MemoryFigures(
        data_mb=round(warm_mb - before_mb, 2),
        growth_mb=round(anonymous_megabytes() - warm_mb, 2),
        batches=batches,
    )
