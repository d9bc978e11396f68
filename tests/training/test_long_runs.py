"""Ten thousand steps: what a run holds of the host at its end it held near its beginning."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_bert.benchmark.process import resident_megabytes
from megatron_bert.config.schema import Config
from tests.distributed_harness import run_ranks
from tests.training.runs import Stops, train

STEPS, SAVE_EVERY = 10_000, 500
# By then every cache has been filled: the first saves and evaluations are over.
WARM_UP_STEPS = 2 * SAVE_EVERY
MAX_RISE_MB = 2.0
MAX_BYTES_A_LINE = 500


@dataclass(frozen=True)
class Holdings:
    """What a rank's process and its run directory hold at one step."""

    step: int
    resident_mb: float
    open_files: int
    threads: int
    other_bytes: int
    metrics_bytes: int
    journal_bytes: int

    @classmethod
    def at(cls, step: int, run_dir: Path) -> Holdings:
        for thread in threading.enumerate():
            if thread.name.startswith("save of step"):
                thread.join()
        # What waits for the collector only is not held for good.
        gc.collect()
        sizes = {path: path.stat().st_size for path in run_dir.rglob("*") if path.is_file()}
        metrics_bytes = sizes.pop(run_dir / "metrics.jsonl")
        journal_bytes = sizes.pop(run_dir / "jobs.jsonl")
        return cls(
            step,
            resident_megabytes(),
            len(list(Path("/proc/self/fd").iterdir())),
            len(list(Path("/proc/self/task").iterdir())),
            sum(sizes.values()),
            metrics_bytes,
            journal_bytes,
        )


class _Observer(Stops):
    """Stops nothing, and takes note of what is held between two saves."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.seen: list[Holdings] = []
        self._run_dir = run_dir
        self._asked = 0

    @property
    def reason(self) -> str | None:
        self._asked += 1
        if self._asked > WARM_UP_STEPS and self._asked % SAVE_EVERY == SAVE_EVERY // 2:
            self.seen.append(Holdings.at(self._asked, self._run_dir))
        return None


def _train(config: Config) -> Sequence[Holdings]:
    observer = _Observer(config.run.directory)
    train(config, observer)
    return observer.seen


@pytest.mark.faults
def test_ten_thousand_steps_take_no_more_memory_files_threads_or_disk_than_the_first(
    tiny_run: Callable[..., Config],
) -> None:
    config = tiny_run(
        model={
            "num_layers": 1,
            "hidden_size": 8,
            "ffn_hidden_size": 8,
            "num_attention_heads": 1,
            "max_position_embeddings": 16,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        mlm={"unit": "token"},
        curriculum=[{"seq_length": 16, "steps": STEPS}],
        batch={"global_size": 1, "micro_size": 1},
        checkpoint={"interval": SAVE_EVERY, "keep": 2, "async": True},
        eval={"interval": SAVE_EVERY, "batches": 1},
    )
    (seen,) = run_ranks(1, _train, config, deadline_seconds=500)
    first, last = seen[0], seen[-1]
    assert last.step == STEPS - SAVE_EVERY // 2
    assert max(held.resident_mb for held in seen) < first.resident_mb + MAX_RISE_MB, seen
    for held in seen:
        assert held.open_files == first.open_files, held
        assert held.threads == first.threads, held
        assert held.other_bytes < first.other_bytes * 1.01, held
        assert held.metrics_bytes < held.step * MAX_BYTES_A_LINE, held
        # A line for the job's start, and one for each save.
        assert held.journal_bytes < (held.step // SAVE_EVERY + 1) * MAX_BYTES_A_LINE, held
