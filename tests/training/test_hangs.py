"""Ranks under torchrun that stop answering or die: the others name them and end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from megatron_bert.training.roll_call import ANSWER_WITHIN_SECONDS

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 15.0
# Of torchrun, for a process that does not follow SIGTERM, such as a stopped one.
KILL_SECONDS = 30.0
SLACK_SECONDS = 20.0  # for leaving interpreters on a busy machine
BUSY_SECONDS = 3.0  # what a busy machine adds to a deadline that is kept
START_SECONDS = 120.0

pytestmark = pytest.mark.faults


class _Job:
    """A job of several ranks, its output in a file, all of its processes killed in the end."""

    def __init__(self, config: Config, ranks: int, folder: Path) -> None:
        self.run = config.run.directory
        path = folder / "config.yaml"
        path.write_text(dump_config(config))
        self._log = folder / "output.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *(f"--nproc-per-node={ranks}", str(CHECKOUT / "pretrain_bert.py")),
                    *("--config", str(path)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""},
                start_new_session=True,
            )

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        # Workers of torchrun lead sessions of their own.
        if self._process.poll() is None:
            for process in [*self._workers().values(), self._process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert self._process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        metrics = self.run / "metrics.jsonl"
        text = f'"step": {step},'
        self.wait_for(lambda: metrics.exists() and text in metrics.read_text(), START_SECONDS)

    def send(self, number: signal.Signals, rank: int) -> int:
        process = self._workers()[rank]
        os.kill(process, number)
        return process

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def failed_at(self) -> float:
        """When `FAILED` was last written, in seconds since the epoch."""
        return (self.run / "FAILED").stat().st_mtime

    def failed(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "FAILED").read_text())
        return found

    def _workers(self) -> dict[int, int]:
        """Processes by rank."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(status.read_text().rpartition(")")[2].split()[1])
                environment = (status.parent / "environ").read_bytes()
            except OSError:
                continue  # it ended meanwhile, or is another user's
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", environment)
            if parent == self._process.pid and rank:
                found[int(rank[1])] = int(status.parent.name)
        return found


def _endless(tiny_run: Callable[..., Config], **changes: Any) -> Config:
    return tiny_run(
        curriculum=[{"seq_length": 32, "steps": 10**6}],
        distributed={"timeout_seconds": TIMEOUT_SECONDS},
        valid=False,
        **changes,
    )


@pytest.mark.parametrize(
    ("ranks", "stopped", "changes"),
    [
        (2, 0, {}),
        (2, 1, {"parallel": {"pipeline": 2}, "data": {"threads": 2}}),
        (3, 1, {"checkpoint": {"interval": 1, "async": True}}),
    ],
    ids=["first", "pipeline", "beside-saves"],
)
def test_a_stopped_rank_ends_the_run_within_the_timeout_and_is_named(
    tiny_run: Callable[..., Config],
    tmp_path: Path,
    ranks: int,
    stopped: int,
    changes: dict[str, Any],
) -> None:
    with _Job(_endless(tiny_run, **changes), ranks, tmp_path) as job:
        job.wait_for_step(5)
        process = job.send(signal.SIGSTOP, stopped)
        stopped_at = time.time()
        # Another 10 s for a save in flight that is given up.
        limit = TIMEOUT_SECONDS + (10.0 if "checkpoint" in changes else 0.0)
        job.wait_for((job.run / "FAILED").exists, limit + SLACK_SECONDS)
        # The bare error, as soon as the message failed; then what the roll call found.
        expired_at = job.failed_at()
        assert expired_at - stopped_at < limit + BUSY_SECONDS
        job.wait_for(
            lambda: job.failed()["error"] == "PeersLostError", ANSWER_WITHIN_SECONDS + SLACK_SECONDS
        )
        failed = job.failed()
        assert job.failed_at() - expired_at < ANSWER_WITHIN_SECONDS + 1.0 + BUSY_SECONDS
        assert failed["reason"].startswith(f"rank {stopped} (host ")
        assert f"process {process}) stopped answering" in failed["reason"]
        if stopped != 0:
            # As torchrun would, had the test waited for it; the first case does.
            os.kill(process, signal.SIGKILL)
        assert job.wait(KILL_SECONDS + SLACK_SECONDS) == 1


def test_a_killed_rank_is_named(tiny_run: Callable[..., Config], tmp_path: Path) -> None:
    with _Job(_endless(tiny_run), 3, tmp_path) as job:
        job.wait_for_step(5)
        process = job.send(signal.SIGKILL, 2)
        assert job.wait(KILL_SECONDS + SLACK_SECONDS) == 1
        reason = job.failed()["reason"]
        assert f"process {process}) stopped answering, or died" in reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_last_rank_stops_all_of_them_cleanly(
    tiny_run: Callable[..., Config], tmp_path: Path, number: signal.Signals
) -> None:
    config = _endless(tiny_run, parallel={"pipeline": 2}, data={"threads": 2})
    with _Job(config, 2, tmp_path) as job:
        job.wait_for_step(5)
        job.send(number, 1)
        assert job.wait(TIMEOUT_SECONDS + SLACK_SECONDS) == 0, job.output
        stopped = json.loads((job.run / "STOPPED").read_text())
        saved = (job.run / "checkpoints" / "latest").read_text().strip()
        assert saved == f"step_{stopped['step']:08d}"
        assert f"signal {number.name} on rank 1" in stopped["reason"]
