"""What a run says: on a (pseudo-)terminal a view that stays, elsewhere plain lines."""

from __future__ import annotations

import fcntl
import io
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from megatron_bert.training.progress import Progress
from tests.deadlines import DEADLINE_SECONDS
from tests.small_model import small_config

CHECKOUT = Path(__file__).resolve().parents[2]
ROWS, COLUMNS = 24, 200


class Terminal:
    """A pseudo-terminal that a run writes to."""

    def __init__(self, columns: int = COLUMNS) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._columns = columns
        self._bytes = bytearray()
        self._marks = threading.Semaphore(0)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # The end of what is written comes as an error.
        with suppress(OSError):
            while part := os.read(self._master, 4096):
                self._bytes += part.replace(b"\0", b"")
                for _ in range(part.count(b"\0")):
                    self._marks.release()

    def written(self) -> str:
        """All that was written until now."""
        self.stream.write("\0")
        self.stream.flush()
        assert self._marks.acquire(timeout=10.0)
        return self._bytes.decode()

    def screen(self) -> list[str]:
        """The lines that stand there now, empty ones left out."""
        return [line for line in screen(self.written(), self._columns) if line]

    def close(self) -> None:
        """Hang up."""
        self.stream.close()
        self._reader.join(10.0)
        os.close(self._master)


def screen(text: str, columns: int) -> list[str]:
    """What stands on a terminal after `text` was written to it."""
    cells: dict[tuple[int, int], str] = {}
    row = column = 0
    for part in re.findall(r"\x1b\[A|[^\x1b]", text):
        if part == "\x1b[A":
            row = max(row - 1, 0)
        elif part == "\r":
            column = 0
        elif part == "\n":
            row += 1
        else:
            assert column < columns, f"line {row} is longer than the terminal is wide"
            cells[row, column] = part
            column += 1
    lines = [""] * (1 + max((row for row, _ in cells), default=0))
    for (row, column), character in sorted(cells.items()):
        lines[row] = lines[row].ljust(column) + character
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """Makes a terminal that is standard output and error, and which the root logger writes to."""
    opened: list[Terminal] = []
    root, level, handlers = logging.getLogger(), logging.getLogger().level, []

    def start(columns: int = COLUMNS) -> Terminal:
        shown = Terminal(columns)
        opened.append(shown)
        monkeypatch.setattr(sys, "stdout", shown.stream)
        monkeypatch.setattr(sys, "stderr", shown.stream)
        monkeypatch.setenv("TERM", "xterm")
        handlers.append(logging.StreamHandler(shown.stream))
        root.addHandler(handlers[-1])
        root.setLevel(logging.INFO)
        return shown

    yield start
    for handler in handlers:
        root.removeHandler(handler)
    root.setLevel(level)
    for shown in opened:
        shown.close()


CURRICULUM = Curriculum(
    small_config(
        curriculum=[
            {"seq_length": 32, "steps": 4},
            {"seq_length": 64, "steps": 3, "batch": {"global_size": 4}},
        ]
    )
)


def progress(
    interval: int, *, saved: int = 0, step_flops: Sequence[float] = (1.0, 1.0)
) -> Progress:
    """Progress of a run of seven steps, of which the clock says that each takes a second."""
    ticks = count()
    return Progress(CURRICULUM, step_flops, interval, lambda: saved, lambda: float(next(ticks)))


def take(shown: Progress, step: int, **values: Any) -> None:
    record = {
        "step": step,
        "loss": step / 2,
        "lr": 1e-3,
        "grad_norm": 2.0,
        "step_seconds": 0.5,
        **values,
    }
    shown.after_step(record, CURRICULUM.at(step))


def test_without_a_terminal_a_plain_line_comes_with_each_stage_every_interval_and_at_the_end(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    lines = progress(3)
    for step in range(1, 8):
        take(lines, step)
    lines.close()
    figures = "lr 1.00e-03 · grad 2.00 · 512 tokens/s"
    assert caplog.messages == [
        f"step 1/7 · stage 1/2 (32) · loss 0.5000 · {figures} · 3 s left, 2 s of the stage · "
        "no checkpoint yet",
        f"step 3/7 · stage 1/2 (32) · loss 1.2500 · {figures} · 2 s left, 0 s of the stage · "
        "no checkpoint yet",
        f"step 5/7 · stage 2/2 (64) · loss 2.5000 · {figures} · 1 s left, 1 s of the stage · "
        "no checkpoint yet",
        f"step 6/7 · stage 2/2 (64) · loss 3.0000 · {figures} · 0 s left, 0 s of the stage · "
        "no checkpoint yet",
        f"step 7/7 · stage 2/2 (64) · loss 3.2500 · {figures} · 0 s left, 0 s of the stage · "
        "no checkpoint yet",
    ]
    assert capsys.readouterr().err == ""


def test_a_line_has_what_is_known_of_the_gpu_and_the_last_checkpoint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    take(progress(1, saved=4_000), 1, mfu=0.4125, peak_memory_gb=61.25)
    (line,) = caplog.messages
    assert " tokens/s · MFU 41.2 % · 61.2 GB · " in line
    assert line.endswith(" · last checkpoint 4,000")
    take(progress(1), 1, mfu=None, peak_memory_gb=1.0)
    assert "MFU" not in caplog.messages[-1], "a chip that is not in the table"


def test_a_first_step_that_compiles_does_not_spoil_what_is_said_of_the_time_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    lines = progress(2)
    take(lines, 1, step_seconds=3600.0)
    take(lines, 2)
    assert "6 h 0 min left" in caplog.messages[0]
    assert "512 tokens/s · 2 s left" in caplog.messages[1]


def test_stages_that_compute_more_take_longer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = progress(1, step_flops=(2e9, 12e9))
    take(lines, 1, step_seconds=1.0)
    take(lines, 5, step_seconds=5.0)
    # Three steps of a second, and three of six times the work; then two of five seconds.
    assert [message.split(" · ")[6] for message in caplog.messages] == [
        "21 s left, 3 s of the stage",
        "10 s left, 10 s of the stage",
    ]


def test_a_loss_that_is_not_finite_stays_out_of_the_mean(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = progress(4)
    for step, loss in enumerate((math.nan, 2.0, math.nan, 4.0), start=1):
        take(lines, step, loss=loss)
    assert [re.findall("loss [^ ]*", line) for line in caplog.messages] == [
        ["loss nan"],
        ["loss 3.0000"],
    ]


def test_a_resumed_job_says_at_once_where_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = progress(100)
    for step in (2, 3):
        take(lines, step)
    lines.close()
    assert [message.split(" · ")[0] for message in caplog.messages] == ["step 2/7"]


def test_on_a_terminal_a_view_of_four_lines_stays_below_what_is_logged(
    terminal: Callable[..., Terminal],
) -> None:
    shown = terminal()
    with closing(progress(2, saved=2)) as view:
        for step in range(1, 7):
            take(view, step, mfu=0.4, peak_memory_gb=61.3)
            if step == 3:
                logging.getLogger().warning("something happens")
        *logged, run, stage, figures, checkpoint = shown.screen()
    # No line an interval: the view has it.
    assert [line[:15] for line in logged] == [
        "step 1/7 · stag",
        "something happe",
        "step 5/7 · stag",
    ]
    assert re.fullmatch(r"run    86 % \|\S+ *\| step 6/7 · 0 s left", run)
    assert re.fullmatch(r"stage  67 % \|\S+ *\| 2/2 \(64\) · 2/3 · 0 s left", stage)
    assert figures == "loss 3.0000 · lr 1.00e-03 · grad 2.00 · 512 tokens/s · MFU 40.0 % · 61.3 GB"
    assert checkpoint == "last checkpoint 2"


def test_closing_the_view_leaves_only_what_was_logged(terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    before = list(logging.getLogger().handlers)
    with closing(progress(2)) as view:
        for step in range(1, 4):
            take(view, step)
        assert logging.getLogger().handlers != before
        view.close()
    assert logging.getLogger().handlers == before
    logging.getLogger().info("stopped")
    first, last = shown.screen()
    assert first.startswith("step 1/7")
    assert last == "stopped"


def test_the_view_is_calm(terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    hundredths = count()
    with closing(
        Progress(CURRICULUM, (1, 1), 1, lambda: 0, lambda: next(hundredths) / 100)
    ) as view:
        for step in (1, 2, 3, 4):
            take(view, step)
    drawn = re.findall(r"step \d/7 · \d s left", shown.written())
    assert len(drawn) == 1, "drawn at every step, however fast they are"


def test_the_view_shows_the_last_step_while_it_is_evaluated_and_saved(
    terminal: Callable[..., Terminal],
) -> None:
    shown = terminal()
    with closing(Progress(CURRICULUM, (1, 1), 1, lambda: 0, lambda: 0.0)) as view:
        for step in range(1, 8):
            take(view, step)
        assert shown.screen()[-4].endswith("| step 1/7 · 3 s left")
        view.refresh()
        run, stage, *_ = shown.screen()[-4:]
        assert re.fullmatch(r"run   100 % \|█+\| step 7/7 · 0 s left", run)
        assert re.fullmatch(r"stage 100 % \|█+\| 2/2 \(64\) · 3/3 · 0 s left", stage)
        drawn = shown.written()
        view.refresh()
        assert shown.written() == drawn, "nothing is new"


def test_no_line_of_the_view_is_longer_than_a_narrow_terminal_is_wide(
    terminal: Callable[..., Terminal],
) -> None:
    shown = terminal(columns=40)
    with closing(progress(2)) as view:
        take(view, 1, mfu=0.4, peak_memory_gb=61.3)
        logged, drawn = shown.written().split("\n", 1)
    assert len(logged) > 40, "the terminal breaks it"
    lines = screen(drawn, 40)
    assert lines[2] == "loss 0.5000 · lr 1.00e-03 · grad 2.00 ·"


def test_behind_a_pipe_a_terminal_gets_plain_lines(
    terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = terminal()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with closing(progress(2)) as lines:
        for step in (1, 2):
            take(lines, step)
    assert [line[:8] for line in shown.screen()] == ["step 1/7", "step 2/7"]


def test_closing_before_any_step_draws_nothing(terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    progress(1).close()
    assert shown.written() == ""


@pytest.mark.slow
def test_a_run_on_a_terminal_leaves_whole_lines_and_nothing_of_the_view(
    terminal: Callable[..., Terminal], tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    shown = terminal()
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(tiny_run()))
    subprocess.run(
        [sys.executable, str(CHECKOUT / "pretrain_bert.py"), "--config", str(config)],
        stdout=shown.stream,
        stderr=shown.stream,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    assert re.search(r"stage +\d+ % \|", shown.written())
    lines = shown.screen()
    assert not [line for line in lines if line.startswith(("run  ", "stage  ", "last checkpoint"))]
    assert [line.split(" · ")[0] for line in lines if "tokens/s" in line] == [
        "step 1/12", "step 8/12", "step 12/12",
    ]  # fmt: skip
    assert lines[-1] == "finished after step 12"
