"""Turns the steps' results into lines of `metrics.jsonl` and of the terminal, one step late."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_bert.config.curriculum import Curriculum, StageSpan
from megatron_bert.config.flops import peak_tflops, row_flops
from megatron_bert.config.schema import Config
from megatron_bert.distributed.device_work import WorkPoint, work_point
from megatron_bert.run.metrics import MetricsFile
from megatron_bert.training.divergence import DivergenceWatch
from megatron_bert.training.progress import Progress
from megatron_bert.training.spikes import SpikeWatch
from megatron_bert.training.step import Agreement, StepNumbers, StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Taken:
    """A step whose results the device may still be computing."""

    step: int
    span: StageSpan
    agreement: Agreement
    learning_rate: float
    result: StepResult
    began: WorkPoint
    data_seconds: float
    peak_memory_gb: float | None


class StepRecorder:
    """Records each step once the next one is under way.

    A step's results are read only after the following step was submitted to the device, so that
    reading them never leaves the device idle.
    """

    def __init__(
        self,
        config: Config,
        curriculum: Curriculum,
        vocab_size: int,
        world_size: int,
        device: torch.device,
        metrics: MetricsFile | None,
        last_saved: Callable[[], int],
        earlier_losses: Iterable[tuple[float, int]] = (),
    ) -> None:
        """Record on the rank that has a metrics file; every rank watches for divergence.

        Args:
            config: of the run.
            curriculum: of the run.
            vocab_size: padded vocabulary.
            world_size: number of ranks.
            device: the device that computes the steps.
            metrics: where lines go; None on every rank but the first.
            last_saved: returns the step of the newest checkpoint, 0 if there is none.
            earlier_losses: losses and stages of the last steps of the jobs before; only read where
                there is a metrics file.
        """
        self._curriculum = curriculum
        self._metrics = metrics
        self._step_flops = [
            span.global_size
            * row_flops(config.model, vocab_size, span.seq_length, span.masked_slots)
            for span in curriculum.spans
        ]
        self._progress = Progress(curriculum, self._step_flops, config.log.interval, last_saved)
        self._world_size = world_size
        self._device = device
        self._taken: _Taken | None = None
        self._spikes = SpikeWatch(earlier_losses)
        self._divergence = DivergenceWatch(
            config.optimizer.max_skipped, config.run.paths.checkpoints
        )
        self._take_peak_memory()
        self._began = work_point(device, timed=True)
        # A single rank waits for no other, however long a step takes.
        self._timeout = config.distributed.timeout_seconds if world_size > 1 else math.inf

    def add(
        self,
        step: int,
        span: StageSpan,
        agreement: Agreement,
        learning_rate: float,
        result: StepResult,
        data_seconds: float,
    ) -> None:
        """Take note of a step that was just submitted to the device; record the one before it.

        Args:
            step: its number.
            span: the stage that it belongs to.
            agreement: what the ranks agreed on before taking it.
            learning_rate: the learning rate of its update.
            result: its results, on their way to the host.
            data_seconds: how long this rank waited for its rows.

        Raises:
            DivergedError: more than `optimizer.max_skipped` updates in a row were skipped.
            RunError: the metrics could not be written.
            DeviceStalledError: the device does not finish the step before.
        """
        taken = _Taken(
            step,
            span,
            agreement,
            learning_rate,
            result,
            self._began,
            data_seconds,
            self._take_peak_memory(),
        )
        previous, self._taken = self._taken, taken
        self._began = result.parts.ended
        if previous is not None:
            self._record(previous)

    def flush(self) -> None:
        """Record the last step now, waiting for the device; for when no step follows at once."""
        if self._taken is not None:
            self._record(self._taken)
            self._taken = None
        self._progress.refresh()

    def sync(self) -> None:
        """Wait until what was recorded is on the disk."""
        if self._metrics is not None:
            self._metrics.sync()

    def close(self) -> None:
        """Close the metrics file and the view; a step not recorded yet is left out."""
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block, which is not a step, from the steps' times."""
        yield
        self._take_peak_memory()
        self._began = work_point(self._device, timed=True)

    def write_evaluation(self, step: int, span: StageSpan, scores: dict[str, object]) -> None:
        """Write an evaluation's line."""
        if self._metrics is None:
            return
        tokens = self._curriculum.slots_until(step)
        self._metrics.write({"step": step, "stage": span.index, "tokens": tokens, **scores})
        logger.info(
            "step %s · validation loss %.4f · accuracy %.4f",
            f"{step:,}",
            scores["valid_loss"],
            scores["valid_accuracy"],
        )

    def _record(self, taken: _Taken) -> None:
        numbers = taken.result.read(self._timeout)
        rows = taken.span.rows_of(taken.step)
        if self._metrics is not None:
            line = self._line(taken, numbers)
            self._metrics.write(line | self._remarks(taken, numbers, rows))
            self._progress.after_step(line, taken.span)
        self._divergence.add(taken.step, rows, numbers.finite_here, skipped=numbers.skipped)

    def _remarks(self, taken: _Taken, numbers: StepNumbers, rows: range) -> dict[str, object]:
        """Warn if the step's numbers went wrong; return what its line then has in addition."""
        remarks: dict[str, object] = {"rows": [rows.start, rows[-1]]}
        where = (
            f"rows {rows.start:,} to {rows[-1]:,} (tools/inspect_data.py --config FILE --steps "
            f"{taken.step}:{taken.step} --text)"
        )
        if numbers.skipped:
            logger.warning(
                "step %s: loss or gradient is not finite, update skipped; %s",
                f"{taken.step:,}",
                where,
            )
            return remarks
        limit = self._spikes.limit_exceeded(numbers.loss, taken.span.index)
        if limit is None:
            return {}
        logger.warning(
            "step %s: loss %.4f is a spike, above %.4f; %s",
            f"{taken.step:,}",
            numbers.loss,
            limit,
            where,
        )
        return {**remarks, "spike_limit": limit}

    def _line(self, taken: _Taken, numbers: StepNumbers) -> dict[str, object]:
        span = taken.span
        seconds = taken.began.seconds_until(taken.result.parts.ended)
        line: dict[str, object] = {
            "step": taken.step,
            "stage": span.index,
            "seq_length": span.seq_length,
            "loss": numbers.loss,
            "lr": taken.learning_rate,
            "grad_norm": numbers.grad_norm,
            "skipped": numbers.skipped,
            "masked_tokens": taken.agreement.masked_tokens,
            "consumed_rows": self._curriculum.rows_until(taken.step),
            "batch_hash": f"{taken.agreement.batch_hash:016x}",
            "tokens": self._curriculum.slots_until(taken.step),
            "tokens_per_second": span.slots_per_step / seconds,
            "step_seconds": seconds,
            "data_seconds": taken.data_seconds,
            **taken.result.parts.seconds(),
        }
        if self._device.type == "cuda":
            tflops = self._step_flops[span.index] / seconds / self._world_size / 1e12
            line["tflops_per_gpu"] = tflops
            line["mfu"] = _mfu(tflops)
            line["peak_memory_gb"] = taken.peak_memory_gb
        return line

    def _take_peak_memory(self) -> float | None:
        """Peak device memory in use since the last call, GB.

        A step's memory is allocated when the step is submitted to the device.
        """
        if self._device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self._device) / 1e9
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def _mfu(tflops: float) -> float | None:
    """Share of the chip's dense BF16 peak; None for a chip that is not in the table."""
    peak = peak_tflops(torch.cuda.get_device_name())
    return None if peak is None else tflops / peak
