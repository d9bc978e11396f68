from __future__ import annotations

import io

import pytest

from megatron_bert.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with ProgressBar("reading", 1000, stream=stream) as progress:
        progress.show(500, "half")
        progress.show(1000)
    assert "100%" in stream.getvalue()
    assert "\r" in stream.getvalue()


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("megatron_bert.progress_bar._SECONDS_BETWEEN_LINES", 0.0)
    with ProgressBar("reading", 1000, stream=stream) as progress:
        progress.show(500, "1.0 M tokens")
        progress.show(1000)
    assert stream.getvalue() == (
        "reading: 50 % of the input, 1.0 M tokens\nreading: 100 % of the input\n"
    )


def test_other_units_than_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr("megatron_bert.progress_bar._SECONDS_BETWEEN_LINES", 0.0)
    for place in (stream, terminal):
        with ProgressBar("seed 3", 2000, "step", place) as progress:
            progress.show(1500)
    assert stream.getvalue() == "seed 3: step 1500 of 2000\n"
    assert "0/2000 [00:00<?, ?step/s]" in terminal.getvalue()


def test_a_short_run_writes_no_line() -> None:
    stream = io.StringIO()
    with ProgressBar("reading", 1000, stream=stream) as progress:
        progress.show(500)
    assert stream.getvalue() == ""
