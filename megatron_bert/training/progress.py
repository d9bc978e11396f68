"""What a run says while it goes: on a terminal a view that stays, elsewhere a line an interval."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_bert.config.curriculum import Curriculum, StageSpan
from megatron_bert.words import format_duration

# Seconds between redraws of the view: often enough to look alive, seldom enough to be read.
_DRAW_SECONDS = 0.5

logger = logging.getLogger(__name__)


class Progress:
    """Tells how far a run is, how it goes and when it will end.

    If a person watches (standard output and standard error are a terminal), a few lines at its
    bottom are kept up to date, and log lines are printed above them. Otherwise a line is logged
    every `interval` steps. In both cases a line is logged for the first step of a job and of each
    stage, which shows whether the rest can work, and for the last step.

    Loss and speed are means over the stage's last `interval` steps. The time left is estimated from
    that speed, for later stages in proportion to the FLOPs of their steps (longer rows attend to
    more), and counts steps only: no evaluation, no save.

    Args:
        curriculum: of the run.
        step_flops: FLOPs of a step of each stage.
        interval: steps between two lines.
        last_saved: returns the step of the newest checkpoint, 0 if there is none.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        step_flops: Sequence[float],
        interval: int,
        last_saved: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._curriculum = curriculum
        self._step_flops = step_flops
        self._interval = interval
        self._last_saved = last_saved
        self._clock = clock
        self._recent = _RecentSteps(interval)
        self._stage: int | None = None
        self._watched = _a_person_watches()
        self._view: _View | None = None
        self._drawn = -math.inf
        self._undrawn: tuple[Mapping[str, Any], StageSpan] | None = None

    def after_step(self, record: Mapping[str, Any], span: StageSpan) -> None:
        """Report a step, if it is time to.

        Args:
            record: the step's line of `metrics.jsonl`.
            span: the stage that it belongs to.
        """
        step = record["step"]
        enters, self._stage = span.index != self._stage, span.index
        self._recent.add(record["loss"], record["step_seconds"], enters=enters)
        on_time = not self._watched and step % self._interval == 0
        if enters or on_time or step == self._curriculum.total_steps:
            logger.info("%s", " · ".join(self._line(record, span)))
        self._undrawn = record, span
        if self._watched and self._clock() - self._drawn >= _DRAW_SECONDS:
            self.refresh()

    def refresh(self) -> None:
        """Redraw the view now: the next step may take long, or never come."""
        if self._watched and self._undrawn is not None:
            self._drawn = self._clock()
            self._view = self._view or _View(self._curriculum.total_steps)
            self._draw(self._view, *self._undrawn)
            self._undrawn = None

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._view is not None:
            self._view.close()
            self._view = None

    def _line(self, record: Mapping[str, Any], span: StageSpan) -> Iterator[str]:
        run_left, stage_left = self._seconds_left(record["step"], span)
        yield f"step {record['step']:,}/{self._curriculum.total_steps:,}"
        yield f"stage {self._stage_name(span)}"
        yield from self._figures(record, span)
        yield f"{format_duration(run_left)} left, {format_duration(stage_left)} of the stage"
        yield self._checkpoint()

    def _draw(self, view: _View, record: Mapping[str, Any], span: StageSpan) -> None:
        step = record["step"]
        run_left, stage_left = self._seconds_left(step, span)
        done, length = step - span.first_step + 1, span.num_steps
        view.draw(
            run=(step, f"step {step:,}/{self._curriculum.total_steps:,}", run_left),
            stage=(done, length, f"{self._stage_name(span)} · {done:,}/{length:,}", stage_left),
            texts=[" · ".join(self._figures(record, span)), self._checkpoint()],
        )

    def _stage_name(self, span: StageSpan) -> str:
        return f"{span.index + 1}/{len(self._curriculum.spans)} ({span.seq_length})"

    def _figures(self, record: Mapping[str, Any], span: StageSpan) -> Iterator[str]:
        """How the run goes; MFU and memory are known on CUDA only."""
        yield f"loss {self._recent.loss:.4f}"
        yield f"lr {record['lr']:.2e}"
        yield f"grad {record['grad_norm']:.2f}"
        yield f"{span.slots_per_step / self._recent.seconds:,.0f} tokens/s"
        if record.get("mfu") is not None:
            yield f"MFU {100 * record['mfu']:.1f} %"
        if "peak_memory_gb" in record:
            yield f"{record['peak_memory_gb']:.1f} GB"

    def _checkpoint(self) -> str:
        saved = self._last_saved()
        return f"last checkpoint {saved:,}" if saved else "no checkpoint yet"

    def _seconds_left(self, step: int, span: StageSpan) -> tuple[float, float]:
        """Seconds left of the run and of its current stage."""
        stage_left = (span.last_step - step) * self._recent.seconds
        seconds_per_flop = self._recent.seconds / self._step_flops[span.index]
        later_flops = sum(
            later.num_steps * self._step_flops[later.index]
            for later in self._curriculum.spans[span.index + 1 :]
        )
        return stage_left + later_flops * seconds_per_flop, stage_left


class _RecentSteps:
    """Loss and time of the last steps of a stage."""

    def __init__(self, count: int) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=count)
        self._only_first = False

    def add(self, loss: float, seconds: float, *, enters: bool) -> None:
        # A stage's first step, in which blocks may be compiled, counts only until there is another.
        if enters or self._only_first:
            self._steps.clear()
        self._only_first = enters
        self._steps.append((loss, seconds))

    @property
    def loss(self) -> float:
        """Mean in nats over the finite losses; the last loss if none is finite."""
        losses = [loss for loss, _ in self._steps]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else losses[-1]

    @property
    def seconds(self) -> float:
        """Mean seconds per step."""
        return sum(seconds for _, seconds in self._steps) / len(self._steps)


class _View:
    """Lines at the bottom of a terminal; log lines are printed above them, not through them."""

    def __init__(self, total_steps: int) -> None:
        self._redirection = logging_redirect_tqdm()
        self._redirection.__enter__()
        self._run = _bar("run  ", 0)
        self._run.total = total_steps
        self._stage = _bar("stage", 1)
        self._texts = [_at_bottom(position, "{desc}") for position in (2, 3)]

    def draw(
        self,
        *,
        run: tuple[int, str, float],
        stage: tuple[int, int, str, float],
        texts: list[str],
    ) -> None:
        """Redraw the lines.

        Args:
            run: steps taken, the position as text, seconds left.
            stage: steps taken in it, its number of steps, the position as text, seconds left.
            texts: the lines below.
        """
        self._run.n, place, left = run
        self._run.set_description_str(f"{place} · {format_duration(left)} left", refresh=True)
        self._stage.n, self._stage.total, place, left = stage
        self._stage.set_description_str(f"{place} · {format_duration(left)} left", refresh=True)
        for line, text in zip(self._texts, texts, strict=True):
            # tqdm cuts bars but not plain text, which would run into the next line.
            line.set_description_str(text[: line.format_dict["ncols"]], refresh=True)

    def close(self) -> None:
        """Remove the lines."""
        for line in (*reversed(self._texts), self._stage, self._run):
            line.close()
        self._redirection.__exit__(None, None, None)


def _bar(name: str, position: int) -> tqdm[NoReturn]:
    return _at_bottom(position, name + " {percentage:3.0f} % |{bar:20}| {desc}")


def _at_bottom(position: int, bar_format: str) -> tqdm[NoReturn]:
    return tqdm(total=1, position=position, bar_format=bar_format, leave=False, dynamic_ncols=True)


def _a_person_watches() -> bool:
    """Whether lines can stay in place; behind a pipe (`| tee`) others would get in between."""
    streams = (sys.stdout, sys.stderr)
    return os.environ.get("TERM") != "dumb" and all(stream.isatty() for stream in streams)
