"""Runs cut next to the ends of stages and epochs: no row is lost there, and none is read twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _megatron_bert_core import DocumentLengths, RowPlan
from numpy.typing import NDArray

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch
from megatron_bert.data.indexed_dataset import open_dataset
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.training import trainer
from megatron_bert.training.batches import SURPLUS_ROW
from tests.distributed_harness import run_ranks
from tests.training.runs import train

RANKS = 2
# The first epoch ends in the last stage. Two ranks share no batch of nine rows evenly.
STAGES: list[dict[str, Any]] = [
    {"seq_length": 32, "steps": 3},
    {"seq_length": 64, "steps": 3},
    {"seq_length": 48, "steps": 6},
]


@pytest.fixture
def configure(tiny_run: Callable[..., Config]) -> Callable[[str], Config]:
    def configure(name: str) -> Config:
        return tiny_run(
            name,
            model={"num_layers": 1},
            curriculum=STAGES,
            batch={"global_size": 9, "micro_size": 5},
            checkpoint={"interval": 100},
            eval={"interval": 100, "batches": 1},
        )

    return configure


def _texts(batch: Batch) -> list[bytes]:
    """The rows of a micro-batch as they were before masking, surplus ones left out."""
    tokens_BS = batch.tokens_BS.numpy().copy()
    used_B, used_M = np.nonzero(batch.weights_BM.numpy())
    tokens_BS[used_B, batch.masked_BM.numpy()[used_B, used_M]] = batch.labels_BM.numpy()[
        used_B, used_M
    ]
    return [
        tokens.tobytes() + positions.tobytes()
        for row, tokens, positions in zip(
            batch.rows_B.tolist(), tokens_BS, batch.positions_BS.numpy(), strict=True
        )
        if row != SURPLUS_ROW
    ]


def _read_in_two_jobs(cut_after: Sequence[int], configs: Sequence[Config]) -> list[list[bytes]]:
    """Cut each run after a step and take it up again; return the rows that this rank read."""
    read: list[bytes] = []
    agree = trainer.agree

    def note(batches: Sequence[Batch], *rest: Any) -> Any:
        read.extend(text for batch in batches for text in _texts(batch))
        return agree(batches, *rest)

    of_runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "agree", note)
        for step, config in zip(cut_after, configs, strict=True):
            read = []
            train(config, stop_after=step)
            train(config)
            of_runs.append(read)
    return of_runs


class _Plan:
    """The rows that a run is to read, put together in plain Python from the plan's segments."""

    def __init__(self, config: Config) -> None:
        self._curriculum = Curriculum(config)
        self._dataset = open_dataset(config.data.train[0].prefix)
        self._tokenizer = Tokenizer.load(Path(config.data.tokenizer))
        lengths = DocumentLengths(self._dataset, held_out_fraction=0.0, held_out=False)
        shapes = [(span.seq_length, span.num_rows) for span in self._curriculum.spans]
        self._plan = RowPlan([lengths], [1.0], shapes, config.run.seed)

    def rows(self) -> Counter[bytes]:
        steps = range(1, self._curriculum.total_steps + 1)
        return Counter(self._text(row, step) for step in steps for row in self._rows_of(step))

    def epoch_end(self) -> int:
        """The last step before text is read for the second time."""
        times_read = [
            np.zeros(len(self._dataset.document(number)), dtype=np.int64)
            for number in range(self._dataset.num_documents)
        ]
        for step in range(1, self._curriculum.total_steps + 1):
            for row in self._rows_of(step):
                for _, document, offset, length in self._plan.segments(row):
                    times_read[document][offset : offset + length] += 1
            if any((times > 1).any() for times in times_read):
                # Near the end of an epoch rows of both are mixed.
                return step - 1
        raise AssertionError("the run is shorter than an epoch")

    def _rows_of(self, step: int) -> range:
        return self._curriculum.at(step).rows_of(step)

    def _text(self, row: int, step: int) -> bytes:
        tokens, positions = [], []
        for _, document, offset, length in self._plan.segments(row):
            text: NDArray[np.int32] = self._dataset.document(document)[offset : offset + length]
            tokens += [self._tokenizer.cls_id, *text, self._tokenizer.sep_id]
            positions += range(length + 2)
        free = self._curriculum.at(step).seq_length - len(tokens)
        tokens += [self._tokenizer.pad_id] * free
        positions += range(free)
        return b"".join(np.array(some, dtype=np.int32).tobytes() for some in (tokens, positions))


@pytest.mark.parametrize("boundary", ["first stage", "second stage", "epoch"])
def test_a_run_cut_before_at_or_after_a_boundary_reads_every_row_once(
    configure: Callable[[str], Config], boundary: str
) -> None:
    plan = _Plan(configure("plan"))
    end = {"first stage": 3, "second stage": 6, "epoch": plan.epoch_end()}[boundary]
    assert boundary != "epoch" or end > 7, "the epoch's end is to be another than a stage's"
    cut_after = [end - 1, end, end + 1]
    configs = [configure(f"cut{step}") for step in cut_after]
    by_rank = run_ranks(RANKS, _read_in_two_jobs, cut_after, configs)
    expected = plan.rows()
    assert expected.total() == 12 * 9
    for step, first, second in zip(cut_after, *by_rank, strict=True):
        assert Counter(first + second) == expected, f"cut after step {step}"
