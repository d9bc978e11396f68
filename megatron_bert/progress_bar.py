"""How far a long piece of work is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

from megatron_bert.closeable import Closeable

BYTES = "B"
_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar(Closeable):
    """Progress through a known number of bytes or other units, shown on standard error.

    On a terminal a bar is drawn; elsewhere (a log file, a batch job) a line is written every ten
    seconds, so that short runs write none.
    """

    def __init__(
        self, title: str, total: int, unit: str = BYTES, stream: TextIO | None = None
    ) -> None:
        """Begin.

        Args:
            title: what is being done.
            total: how many units there are.
            unit: what is counted, such as "step"; a bar that counts no bytes disappears at its end.
            stream: where to write; standard error by default.
        """
        self._stream = sys.stderr if stream is None else stream
        self._title = title
        self._total = total
        self._unit = unit
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._bar = (
            tqdm(
                total=total,
                desc=title,
                unit=unit,
                unit_scale=unit == BYTES,
                leave=unit == BYTES,
                file=self._stream,
            )
            if self._stream.isatty()
            else None
        )

    def show(self, done: int, note: str = "") -> None:
        """Show how much of the total is done, with an optional remark."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() >= self._next_line:
            place = (
                f"{100 * done // max(1, self._total)} % of the input"
                if self._unit == BYTES
                else f"{self._unit} {done} of {self._total}"
            )
            remark = f", {note}" if note else ""
            self._stream.write(f"{self._title}: {place}{remark}\n")
            self._stream.flush()
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
