from __future__ import annotations

import io

import pytest

from megatron_bert.data.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress("reading", 1000, stream) as progress:
        progress.show(500, "half")
        progress.show(1000)
    assert "100%" in stream.getvalue()
    assert "\r" in stream.getvalue()


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("megatron_bert.data.progress._SECONDS_BETWEEN_LINES", 0.0)
    with Progress("reading", 1000, stream) as progress:
        progress.show(500, "1.0 M tokens")
        progress.show(1000)
    assert stream.getvalue() == (
        "reading: 50 % of the input, 1.0 M tokens\nreading: 100 % of the input\n"
    )


def test_a_short_run_writes_no_line() -> None:
    stream = io.StringIO()
    with Progress("reading", 1000, stream) as progress:
        progress.show(500)
    assert stream.getvalue() == ""
