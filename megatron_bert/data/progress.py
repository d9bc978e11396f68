"""How far a long piece of work is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

from megatron_bert.closeable import Closeable

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Closeable):
    """Progress through a known number of bytes, shown on standard error.

    On a terminal a bar is drawn; elsewhere (a log file, a batch job) a line is written every ten
    seconds, so that short runs write none.
    """

    def __init__(self, title: str, total_bytes: int, stream: TextIO | None = None) -> None:
        """Begin; `stream` is standard error where none is given."""
        self._stream = sys.stderr if stream is None else stream
        self._title = title
        self._total = total_bytes
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._bar = (
            tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, file=self._stream)
            if self._stream.isatty()
            else None
        )

    def show(self, done_bytes: int, note: str = "") -> None:
        """Show that `done_bytes` of the total are done, with a remark."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done_bytes - self._bar.n)
        elif time.monotonic() >= self._next_line:
            percent = 100 * done_bytes // max(1, self._total)
            remark = f", {note}" if note else ""
            self._stream.write(f"{self._title}: {percent} % of the input{remark}\n")
            self._stream.flush()
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
