"""Steps whose loss or gradient is not finite: how many in a row, on which ranks, of which rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_bert.distributed.agreement import Ranks
from megatron_bert.errors import RunError
from megatron_bert.words import numbered

_SOURCES = ("loss", "gradient")

logger = logging.getLogger(__name__)


class DivergedError(RunError):
    """Too many updates in a row were skipped for a loss or gradient that is not finite."""


class DivergenceWatch:
    """Counts consecutive skipped updates; every rank has a watch and adds every step to it.

    Args:
        max_skipped: how many may be skipped in a row.
        checkpoints: the folder of the run's checkpoints, named in the error's remedy.
    """

    def __init__(self, max_skipped: int, checkpoints: Path) -> None:
        self._max_skipped = max_skipped
        self._checkpoints = checkpoints
        self._steps = range(0)  # consecutive skipped steps
        self._rows = range(0)  # the rows that these steps read
        self._sources_here: set[str] = set()  # what was not finite on this rank in these steps

    def add(self, step: int, rows: range, finite_here: Sequence[bool], *, skipped: bool) -> None:
        """Record a step. Collective if it is one skipped step too many.

        Args:
            step: its number.
            rows: the rows of its global batch.
            finite_here: whether what this rank saw was finite: the loss of its own rows, and its
                share of the summed gradient.
            skipped: whether its update was skipped; the same on all ranks.

        Raises:
            DivergedError: more than `max_skipped` updates in a row were skipped, on all ranks.
        """
        if not skipped:
            self._steps = self._rows = range(0)
            self._sources_here.clear()
            return
        if not self._steps:
            self._steps, self._rows = range(step, step), range(rows.start, rows.start)
        self._steps = range(self._steps.start, step + 1)
        self._rows = range(self._rows.start, rows.stop)
        bad = [name for name, finite in zip(_SOURCES, finite_here, strict=True) if not finite]
        self._sources_here.update(bad)
        if "loss" in bad:
            logger.warning("step %s: the loss of this rank's own rows is not finite", f"{step:,}")
        if len(self._steps) > self._max_skipped:
            raise DivergedError(self._describe())

    def _describe(self) -> str:
        first, last = self._steps.start, self._steps[-1]
        by_rank = Ranks().on_all(lambda: self._sources_here)
        where = [
            f"the {source} on {numbered('rank', ranks)}"
            for source in _SOURCES
            if (ranks := [rank for rank, sources in enumerate(by_rank) if source in sources])
        ]
        return (
            f"step {last}: loss or gradient was not finite in {len(self._steps)} steps in a row, "
            f"{first} to {last} (optimizer.max_skipped={self._max_skipped}), which read the rows "
            f"{self._rows.start} to {self._rows[-1]}; not finite were {' and '.join(where)} (of "
            "gradients, ranks hold shares of the sum over all ranks). Look at the rows with "
            f"tools/inspect_data.py --config FILE --steps {first}:{last} --text. Then lower "
            "optimizer.lr, in a new run that goes on from a checkpoint of before: "
            f"optimizer.lr=LOWER run.dir=NEW checkpoint.resume={self._checkpoints}/step_NUMBER; "
            "where there is none, begin anew with optimizer.lr=LOWER"
        )
