from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.training.progress import ProgressLine
from tests.small_model import small_config


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal() -> Iterator[_Terminal]:
    """A terminal that the root logger writes to, as a run's does; not yet standard error."""
    stream = _Terminal()
    handler = logging.StreamHandler(stream)
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def progress_line(interval: int) -> tuple[ProgressLine, Curriculum]:
    config = small_config(
        curriculum=[
            {"seq_length": 32, "steps": 4},
            {"seq_length": 64, "steps": 3, "batch": {"global_size": 4}},
        ]
    )
    curriculum = Curriculum(config)
    return ProgressLine(curriculum, interval), curriculum


def take(progress: ProgressLine, curriculum: Curriculum, step: int) -> None:
    progress.after_step(
        step,
        curriculum.at(step),
        loss=step / 2,
        learning_rate=1e-3,
        grad_norm=2.0,
        seconds=0.5,
    )


def test_without_a_terminal_a_plain_line_comes_with_each_stage_every_interval_and_at_the_end(
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    progress, curriculum = progress_line(3)
    for step in range(1, 8):
        take(progress, curriculum, step)
    progress.close()
    assert caplog.messages == [
        "step 1/7 · stage 1/2 (32) · loss 0.5000 · lr 1.00e-03 · grad 2.00 · 512 tokens/s · 3 s "
        "left",
        "step 3/7 · stage 1/2 (32) · loss 1.5000 · lr 1.00e-03 · grad 2.00 · 512 tokens/s · 2 s "
        "left",
        "step 5/7 · stage 2/2 (64) · loss 2.5000 · lr 1.00e-03 · grad 2.00 · 512 tokens/s · 1 s "
        "left",
        "step 6/7 · stage 2/2 (64) · loss 3.0000 · lr 1.00e-03 · grad 2.00 · 512 tokens/s · 0 s "
        "left",
        "step 7/7 · stage 2/2 (64) · loss 3.5000 · lr 1.00e-03 · grad 2.00 · 512 tokens/s · 0 s "
        "left",
    ]
    assert capsys.readouterr().err == ""


def test_a_resumed_job_says_at_once_where_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress, curriculum = progress_line(100)
    for step in (2, 3):
        take(progress, curriculum, step)
    progress.close()
    assert [message.split(" · ")[0] for message in caplog.messages] == ["step 2/7"]


def test_on_a_terminal_a_bar_stands_below_whole_lines(
    terminal: _Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    progress, curriculum = progress_line(3)
    for step in range(1, 4):
        take(progress, curriculum, step)
    shown = terminal.getvalue()
    assert "0/7" in shown
    # The bar is wiped before a line and drawn again after it.
    line = shown.index("step 3/7")
    assert shown[:line].endswith("\r")
    assert "/7" in shown[shown.index("\n", line) :]
    progress.close()


def test_closing_removes_the_bar_and_gives_the_log_its_handler_back(
    terminal: _Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    before = list(logging.getLogger().handlers)
    progress, curriculum = progress_line(100)
    take(progress, curriculum, 1)
    assert logging.getLogger().handlers != before
    progress.close()
    assert logging.getLogger().handlers == before
    assert terminal.getvalue().endswith("\r")
    length = len(terminal.getvalue())
    progress.close()
    assert len(terminal.getvalue()) == length


def test_the_bar_of_a_resumed_run_begins_where_the_run_does(
    terminal: _Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    progress, curriculum = progress_line(100)
    take(progress, curriculum, 5)
    progress.close()
    assert "4/7" in terminal.getvalue()
    assert "0/7" not in terminal.getvalue()


def test_closing_before_any_step_draws_nothing(
    terminal: _Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    progress, _ = progress_line(1)
    progress.close()
    assert terminal.getvalue() == ""
