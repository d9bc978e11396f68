"""launch/tsubame4.sh under a real Grid Engine of two hosts: limits, losses, stops."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.schedulers.conftest import (
    CHECKOUT,
    ONE_THREAD,
    Run,
    make_run,
    need_scheduler,
    train_uncut,
)
from tests.schedulers.grid_engine import GridEngine

pytestmark = [pytest.mark.schedulers, pytest.mark.timeout(900)]

_START_SECONDS = 120.0
_ENDLESS = 100_000


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GridEngine]:
    need_scheduler(
        ("sge_qmaster", "sge_execd", "qsub"),
        ("gridengine-master", "gridengine-exec", "gridengine-client"),
    )
    if subprocess.run(["ip", "netns", "list"], capture_output=True, check=False).returncode:
        pytest.skip("two hosts on one machine need network namespaces (ip netns)")
    with GridEngine(tmp_path_factory.mktemp("engine")) as running:
        yield running


def submit(
    engine: GridEngine, run: Run, site: str, *options: str, **environment: str
) -> tuple[str, Path]:
    """Submit the real script to both hosts; returns the job's number and its log."""
    log = run.config.with_name("job.log")
    settings = {"PYTHONPATH": site, "MODULES": "no-such-module", **ONE_THREAD, **environment}
    job = engine.submit(
        *("-pe", "mpi_f", "4", "-o", str(log), *options),
        "launch/tsubame4.sh",
        str(run.config),
        cwd=CHECKOUT,
        **settings,
    )
    return job, log


def test_a_run_of_several_jobs_finishes_by_itself_with_the_losses_of_an_uncut_one(
    engine: GridEngine, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    uncut = make_run(tiny_data, tmp_path / "uncut", 160)
    train_uncut(uncut, 2)
    run = make_run(tiny_data, tmp_path / "cut", 160)
    job, log = submit(
        engine, run, site, "-l", "h_rt=50", MARGIN_SECONDS="12", TEST_STEP_SECONDS="0.3"
    )
    engine.wait_for(lambda: not engine.jobs(), 600)
    assert run.ended() == "FINISHED", log.read_text()
    jobs = run.jobs()
    assert len(jobs) >= 3
    assert all(line["nodes"] == 2 for line in jobs)
    expected, steps = uncut.steps(), run.steps()
    assert steps.keys() == expected.keys()
    assert all(steps[n]["loss"] == expected[n]["loss"] for n in steps)
    assert "run.deadline" in log.read_text()
    assert jobs[0]["job"] == job
    assert len({line["job"] for line in jobs}) == len(jobs)
    hosts = {path.name for path in (run.directory / "logs" / job).iterdir() if path.is_dir()}
    assert hosts == {"ge1", "ge2"}


def test_a_deleted_job_saves_and_is_not_scheduled_again(
    engine: GridEngine, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", _ENDLESS)
    job, log = submit(engine, run, site, TEST_STEP_SECONDS="0.1")
    engine.wait_for(lambda: run.last_step() >= 5, _START_SECONDS)
    engine.call("qdel", job)
    engine.wait_for(lambda: not engine.jobs(), 90)
    assert run.ended() == "STOPPED", log.read_text()
    assert len(run.jobs()) == 1


def test_a_job_that_dies_at_once_is_given_up_after_its_tries(
    engine: GridEngine, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", 60)
    _, log = submit(engine, run, site, TRIES="2", TEST_DIE="1")
    engine.wait_for(lambda: not engine.jobs(), 180)
    told = log.read_text()
    assert told.count("what follows:") == 2
    assert "what follows: give-up" in told
