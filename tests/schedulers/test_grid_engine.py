"""launch/tsubame4.sh under a real Grid Engine of two hosts: limits, losses, stops."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.schedulers.conftest import (
    CHECKOUT,
    ENDLESS,
    FEW_STEPS,
    ONE_THREAD,
    START_SECONDS,
    Run,
    make_run,
    need_scheduler,
    train_uncut,
)
from tests.schedulers.grid_engine import GridEngine

pytestmark = [pytest.mark.schedulers, pytest.mark.timeout(900)]


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
    engine: GridEngine, run: Run, site: str, *options: str, slots: str = "4", **environment: str
) -> tuple[str, Path]:
    """Submit the real script, with two slots a host; returns the job's number and its log."""
    log = run.config.with_name("job.log")
    settings = {"PYTHONPATH": site, "MODULES": "no-such-module", **ONE_THREAD, **environment}
    job = engine.submit(
        *("-pe", "mpi_f", slots, "-o", str(log), *options),
        "launch/tsubame4.sh",
        str(run.config),
        cwd=CHECKOUT,
        **settings,
    )
    return job, log


def test_a_run_of_several_jobs_finishes_by_itself_with_the_losses_of_an_uncut_one(
    engine: GridEngine, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    uncut = make_run(tiny_data, tmp_path / "uncut", 250)
    train_uncut(uncut, 2)
    run = make_run(tiny_data, tmp_path / "cut", 250)
    job, log = submit(
        engine, run, site, "-l", "h_rt=70", slots="2-4",
        MARGIN_SECONDS="20", LEAST_SECONDS="20", TEST_STEP_SECONDS="0.3",
        # On a busy machine a job of a minute takes a few steps.
        TRIES="20",
    )  # fmt: skip
    # A host is taken out, for the second job alone.
    engine.wait_for(lambda: len(run.jobs()) == 1, START_SECONDS)
    engine.call("qmod", "-d", "main.q@ge2")
    engine.wait_for(lambda: len(run.jobs()) == 2, 70 + START_SECONDS)
    engine.call("qmod", "-e", "main.q@ge2")
    engine.wait_for(lambda: not engine.jobs(), 600)
    assert run.ended() == "FINISHED", log.read_text()
    jobs = run.jobs()
    assert len(jobs) >= 3
    assert [line["nodes"] for line in jobs[:3]] == [2, 1, 2]
    run.compare(uncut, same_bits_until=jobs[1]["step"])
    assert "run.deadline" in log.read_text()
    assert jobs[0]["job"] == job
    assert len({line["job"] for line in jobs}) == len(jobs)
    hosts = {path.name for path in (run.directory / "logs" / job).iterdir() if path.is_dir()}
    assert hosts == {"ge1", "ge2"}


def test_a_deleted_job_saves_and_is_not_scheduled_again(
    engine: GridEngine, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", ENDLESS)
    job, log = submit(engine, run, site, TEST_STEP_SECONDS="0.1")
    engine.wait_for(lambda: run.last_step() >= 5, START_SECONDS)
    engine.call("qdel", job)
    engine.wait_for(lambda: not engine.jobs(), 90)
    assert run.ended() == "STOPPED", log.read_text()
    assert len(run.jobs()) == 1


def test_a_job_that_dies_at_once_is_given_up_after_its_tries(
    engine: GridEngine, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    _, log = submit(engine, run, site, TRIES="2", TEST_DIE="1")
    engine.wait_for(lambda: not engine.jobs(), 180)
    told = log.read_text()
    assert told.count("what follows:") == 2
    assert "what follows: give-up" in told


@pytest.mark.parametrize("first", ["ge1", "ge2"])
def test_a_node_with_fewer_gpus_than_were_counted_ends_the_job_with_no_other(
    engine: GridEngine, tiny_data: Path, tmp_path: Path, site: str, first: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    _, log = submit(
        engine, run, site, "-masterq", f"main.q@{first}", TEST_GPUS="begin=2:ge1=2:ge2=1"
    )
    engine.wait_for(lambda: not engine.jobs(), START_SECONDS)
    assert "error: node ge2 has 1 GPU(s), the first node 2" in log.read_text()
    assert "what follows" not in log.read_text()
    assert run.jobs() == []


def test_after_a_lost_host_the_run_goes_on_without_it(
    engine: GridEngine, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    _, log = submit(
        engine, run, site, "-masterq", "main.q@ge1", slots="2-4", TEST_STEP_SECONDS="0.2"
    )
    engine.wait_for(lambda: run.last_step() >= 43, START_SECONDS)
    engine.kill_host("ge2")
    # An administrator's part: Grid Engine would take the host for alive for five minutes.
    engine.call("qmod", "-d", "main.q@ge2")
    try:
        engine.wait_for(lambda: not engine.jobs(), 60 + 2 * START_SECONDS)
    finally:
        engine.start_host("ge2")
        engine.call("qmod", "-e", "main.q@ge2")
    assert run.ended() == "FINISHED", log.read_text()
    assert [(line["step"], line["nodes"]) for line in run.jobs()] == [(0, 2), (40, 1)]
    assert sorted(run.steps()) == list(range(1, FEW_STEPS + 1))
