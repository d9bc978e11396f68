"""A directory that a conversion makes stands whole or not at all, whatever ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_bert.checkpoint.new_directory import new_directory
from tests.deadlines import DEADLINE_SECONDS

# Says when it is half way, and waits there for the signal.
HALF_WAY = """
import sys, time
from pathlib import Path
from megatron_bert.checkpoint.new_directory import new_directory
with new_directory(Path(sys.argv[1])) as staging:
    (staging / "half").write_text("of it")
    print("half way", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind_and_ends_the_process_as_it_would_have(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", HALF_WAY, tmp_path / "new" / "model", str(DEADLINE_SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        assert len(list((tmp_path / "new").iterdir())) == 1
        process.send_signal(number)
        assert process.wait(DEADLINE_SECONDS) == -number
    assert list(tmp_path.iterdir()) == []


def test_who_listens_for_sigterm_goes_on_to(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with new_directory(tmp_path / "model"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert (tmp_path / "model").is_dir()


def test_sigterm_is_the_default_again_behind_it(tmp_path: Path) -> None:
    # A test that trained in this process has left its own.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with new_directory(tmp_path / "model"):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_makes_one_too(tmp_path: Path) -> None:
    def make() -> None:
        with new_directory(tmp_path / "model"):
            pass

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert (tmp_path / "model").is_dir()
