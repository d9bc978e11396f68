"""launch/local.sh and what all scripts share, without a scheduler."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.deadlines import DEADLINE_SECONDS
from tests.schedulers.conftest import (
    CHECKOUT,
    ENDLESS,
    FEW_STEPS,
    Run,
    make_run,
    train_uncut,
)


class Script:
    """launch/local.sh with two ranks, in the background; its output is in a file."""

    def __init__(self, run: Run, site: str, **environment: str) -> None:
        self._run = run
        self._log = run.config.with_name("job.log")
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                ["bash", "launch/local.sh", str(run.config)],
                cwd=CHECKOUT,
                env={
                    **os.environ,
                    "RANKS_PER_NODE": "2",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": site,
                    "TEST_STEP_SECONDS": "0.05",
                    **environment,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not done():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """Return the ranks' processes by rank."""
        return {
            int(found[1]): process
            for process, environment in self._processes().items()
            if (found := re.search(rb"(?:^|\0)RANK=(\d+)\0", environment))
        }

    def kill(self) -> None:
        """Leave nothing of it."""
        for process in [self.process.pid, *self._processes()]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def _processes(self) -> dict[int, bytes]:
        """Those that were given the configuration, and their environments."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if bytes(self._run.config) in (folder / "cmdline").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "environ").read_bytes()
        return found


@contextmanager
def script(run: Run, site: str, **environment: str) -> Iterator[Script]:
    started = Script(run, site, **environment)
    try:
        yield started
    finally:
        started.kill()


@pytest.fixture(scope="module")
def uncut(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tiny_data, tmp_path_factory.mktemp("runs") / "uncut", FEW_STEPS)
    train_uncut(run, 2)
    return run


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_healed_inside_the_job_and_losses_go_on(
    tiny_data: Path, tmp_path: Path, site: str, uncut: Run, rank: int
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    with script(run, site, RESTARTS="1") as job:
        job.wait_for(lambda: run.last_step() >= 43)
        os.kill(job.ranks()[rank], signal.SIGKILL)
        assert job.process.wait(DEADLINE_SECONDS) == 0, job.output
    assert run.ended() == "FINISHED"
    assert job.output.count("what follows:") == 1
    assert [line["step"] for line in run.jobs()] == [0, 40]
    run.compare(uncut)


@pytest.mark.slow
def test_a_stop_is_told_in_a_line_and_the_same_command_goes_on(
    tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", ENDLESS)
    with script(run, site) as job:
        job.wait_for(lambda: run.last_step() >= 5)
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(DEADLINE_SECONDS) == 0, job.output
    assert run.ended() == "STOPPED"
    assert "told to stop by SIGTERM; the ranks of this node have ended" in job.output
    assert "Traceback" not in job.output
    stopped = run.last_step()
    with script(run, site) as job:
        job.wait_for(lambda: run.last_step() > stopped)
    assert [line["step"] for line in run.jobs()] == [0, stopped]


@pytest.mark.parametrize(
    ("first", "node", "why"),
    [
        (2, 1, r"node \S+ has 1 GPU\(s\), the first node 2; .* or set RANKS_PER_NODE"),
        (0, 2, r"node \S+ has 2 GPU\(s\), the first node 0; "),
    ],
)
def test_a_node_with_other_gpus_than_the_first_is_refused(
    tiny_data: Path, tmp_path: Path, site: str, first: int, node: int, why: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    with script(
        run, site, RANKS_PER_NODE="", TEST_GPUS=f"begin={first}:{socket.gethostname()}={node}"
    ) as job:
        assert job.process.wait(DEADLINE_SECONDS) == 2, job.output
    assert re.search(f"error: {why}", job.output)
    assert "what follows" not in job.output
    assert run.jobs() == []


@pytest.mark.parametrize(("name", "submit"), [("slurm", "sbatch"), ("tsubame4", "qsub")])
def test_a_job_script_that_was_not_submitted_in_the_checkout_says_how(
    tmp_path: Path, name: str, submit: str
) -> None:
    for folder in ({}, {"SLURM_SUBMIT_DIR": str(tmp_path), "SGE_O_WORKDIR": str(tmp_path)}):
        answer = subprocess.run(
            ["bash", str(CHECKOUT / "launch" / f"{name}.sh"), "config.yaml"],
            env={"PATH": os.environ["PATH"], **folder},
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        assert answer.returncode == 2
        assert f"in the checkout's root: {submit}" in answer.stderr


def test_relative_paths_are_those_of_the_folder_that_it_is_called_in(tmp_path: Path) -> None:
    source = (CHECKOUT / "examples" / "small_cpu.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(source)
    refused = subprocess.run(
        ["bash", str(CHECKOUT / "launch" / "local.sh"), "mine.yaml", "data.tokenizer=no.model"],
        cwd=tmp_path,
        env={**os.environ, "RANKS_PER_NODE": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert refused.returncode == 2, refused.stderr
    assert "no.model" in (tmp_path / "runs" / "mine" / "FAILED").read_text()
