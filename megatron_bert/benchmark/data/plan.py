"""Planning every row of a run: its time and its memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from _megatron_bert_core import RowPlan
from numpy.typing import NDArray

from megatron_bert.benchmark.process import (
    anonymous_megabytes,
    bytes_written,
    peak_resident_megabytes,
    resident_megabytes,
)
from megatron_bert.benchmark.synthetic import divide_documents, draw_lengths
from megatron_bert.benchmark.timing import Timing


@dataclass(frozen=True)
class PlanWork:
    """A run to plan.

    Attributes:
        documents: of all corpora.
        tokens: of all corpora, about.
        weights: of each corpus; the documents are divided in proportion to them.
        stages: (seq_length, rows) of each stage.
        repetitions: how often the run is planned.
    """

    documents: int
    tokens: int
    weights: Sequence[float]
    stages: Sequence[tuple[int, int]]
    repetitions: int


@dataclass(frozen=True)
class PlanFigures:
    """What planning took; memory in 10^6 bytes.

    Attributes:
        documents: of all corpora.
        tokens: of all corpora.
        rows: of all stages.
        epochs: how many times over the run reads each corpus.
        seconds: the minimum.
        median_seconds: the median.
        peak_rss_mb: the most that the process held up to the end of the first plan: interpreter,
            document lengths and plan.
        lengths_rss_mb: what it held before that: interpreter and document lengths.
        kept_mb: what the plan itself keeps.
        bytes_written: to files of any kind, while planning.
    """

    documents: int
    tokens: int
    rows: int
    epochs: list[float]
    seconds: float
    median_seconds: float
    peak_rss_mb: float
    lengths_rss_mb: float
    kept_mb: float
    bytes_written: int


def measure_plan(work: PlanWork) -> PlanFigures:
    """Plan a run in this process, which should be new."""
    counts = divide_documents(work.documents, work.weights)
    mean_tokens = work.tokens / work.documents
    lengths = [draw_lengths(count, mean_tokens, seed) for seed, count in enumerate(counts)]
    lengths_rss_mb, anonymous_mb = resident_megabytes(), anonymous_megabytes()
    written = bytes_written()
    plan, first_seconds = _timed_plan(lengths, work)
    written = bytes_written() - written
    peak_rss_mb = peak_resident_megabytes()
    kept_mb = anonymous_megabytes() - anonymous_mb
    rows, epochs = plan.num_rows, plan.epochs()
    del plan
    others = [_timed_plan(lengths, work)[1] for _ in range(work.repetitions - 1)]
    timing = Timing((first_seconds, *others))
    return PlanFigures(
        documents=sum(counts),
        tokens=sum(int(some.sum(dtype=np.int64)) for some in lengths),
        rows=rows,
        epochs=[round(read, 3) for read in epochs],
        seconds=round(timing.best, 3),
        median_seconds=round(timing.median, 3),
        peak_rss_mb=round(peak_rss_mb, 1),
        lengths_rss_mb=round(lengths_rss_mb, 1),
        kept_mb=round(kept_mb, 1),
        bytes_written=written,
    )


def _timed_plan(lengths: Sequence[NDArray[np.int32]], work: PlanWork) -> tuple[RowPlan, float]:
    begin = time.perf_counter()
    plan = RowPlan(lengths, work.weights, work.stages, seed=0)
    return plan, time.perf_counter() - begin
