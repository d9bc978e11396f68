"""launch/slurm.sh under a real Slurm of two nodes: limits, other nodes, losses, stops."""

from __future__ import annotations

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
from tests.schedulers.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.schedulers, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    need_scheduler(("slurmctld", "slurmd", "munged"), ("slurm-wlm", "munge"))
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), 16817) as running:
        yield running


def submit(
    cluster: SlurmCluster, run: Run, site: str, *options: str, **environment: str
) -> tuple[str, Path]:
    """Submit the real script; returns the job's number and its log."""
    log = run.config.with_name("job.log")
    job = cluster.submit(
        f"--output={log}",
        *options,
        "launch/slurm.sh",
        str(run.config),
        cwd=CHECKOUT,
        # Both nodes are this machine, and their names do not resolve.
        RENDEZVOUS_HOST="127.0.0.1",
        PYTHONPATH=site,
        **ONE_THREAD,
        **environment,
    )
    return job, log


def go_on(cluster: SlurmCluster, job: str, **changes: str) -> None:
    """Spare a requeued job most of the two minutes that Slurm has it wait.

    Not all: in the second in which it ended, a node takes the next start for one of the job that
    has just been revoked.
    """
    for name, value in changes.items():
        cluster.call("scontrol", "update", f"JobId={job}", f"{name}={value}")
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def test_a_run_of_several_jobs_finishes_by_itself_with_the_losses_of_an_uncut_one(
    cluster: SlurmCluster, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    uncut = make_run(tiny_data, tmp_path / "uncut", 300)
    train_uncut(uncut, 2)
    run = make_run(tiny_data, tmp_path / "cut", 300)
    # A minute has at most 45 s of steps; all of them take 75.
    job, log = submit(
        cluster, run, site, "--nodes=2", "--time=1", "--signal=B:USR1@1",
        MARGIN_SECONDS="15", LEAST_SECONDS="20", TEST_STEP_SECONDS="0.25",
        # On a busy machine a job of a minute takes a few steps.
        TRIES="20",
    )  # fmt: skip
    changes = {2: {"NumNodes": "1"}, 3: {"NumNodes": "2", "TimeLimit": "10"}}
    while True:
        cluster.wait_for(lambda: cluster.state(job) in ("PENDING", "COMPLETED", "FAILED"), 600)
        if cluster.state(job) != "PENDING":
            break
        go_on(cluster, job, **changes.get(len(run.jobs()) + 1, {}))
        cluster.wait_for(lambda: cluster.state(job) != "PENDING", START_SECONDS)
    assert cluster.state(job) == "COMPLETED", log.read_text()
    assert run.ended() == "FINISHED"
    jobs = run.jobs()
    assert [line["nodes"] for line in jobs] == [2, 1, 2]
    run.compare(uncut, same_bits_until=jobs[1]["step"])
    assert "run.deadline" in log.read_text() or "SIGUSR1" in log.read_text()
    logs = run.directory / "logs" / job
    assert sorted(path.name for path in logs.rglob("stdout.log"))
    assert (logs / "node.sh").exists()


def test_a_cancelled_job_saves_and_is_not_submitted_again(
    cluster: SlurmCluster, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", ENDLESS)
    job, log = submit(cluster, run, site, "--nodes=2", TEST_STEP_SECONDS="0.1")
    cluster.wait_for(lambda: run.last_step() >= 5, START_SECONDS)
    cluster.call("scancel", job)
    cluster.wait_for(lambda: not cluster.call("squeue", "--noheader"), 60)
    assert run.ended() == "STOPPED", log.read_text()
    assert cluster.state(job) == "CANCELLED"
    assert "cancelled: no other job follows" in log.read_text()
    # What is saved is the step that was told last.
    assert (run.directory / "checkpoints" / f"step_{run.last_step():08d}").is_dir()


@pytest.mark.parametrize("notice", ["USR1", "USR2"])
def test_a_notice_stops_the_job_and_another_follows_unless_held(
    cluster: SlurmCluster, tiny_data: Path, tmp_path: Path, site: str, notice: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", ENDLESS)
    job, log = submit(cluster, run, site, "--nodes=1", TEST_STEP_SECONDS="0.1")
    cluster.wait_for(lambda: run.last_step() >= 5, START_SECONDS)
    cluster.call("scancel", "--batch", f"--signal={notice}", job)
    cluster.wait_for(lambda: cluster.state(job) == "PENDING", 60)
    assert "what follows: again" in log.read_text()
    stopped = run.last_step()
    go_on(cluster, job)
    cluster.wait_for(lambda: run.last_step() > stopped + 5, START_SECONDS)
    assert run.jobs()[1]["step"] == stopped
    (run.directory / "HOLD").touch()
    cluster.call("scancel", "--batch", f"--signal={notice}", job)
    cluster.wait_for(lambda: cluster.state(job) == "COMPLETED", 60)
    assert "what follows: held" in log.read_text()


def test_a_job_that_dies_at_once_is_given_up_after_its_tries(
    cluster: SlurmCluster, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    job, log = submit(cluster, run, site, "--nodes=1", TRIES="2", TEST_DIE="1")
    cluster.wait_for(lambda: log.exists() and "again" in log.read_text(), 90)
    cluster.wait_for(lambda: cluster.state(job) == "PENDING", 60)
    go_on(cluster, job)
    cluster.wait_for(lambda: cluster.state(job) == "FAILED", START_SECONDS)
    told = log.read_text()
    assert told.count("what follows:") == 2
    assert "what follows: give-up" in told
    assert "2 job(s) in a row brought no checkpoint 10 steps newer" in told


def test_a_configuration_that_cannot_be_used_ends_the_job_with_no_other(
    cluster: SlurmCluster, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    run.config.write_text(run.config.read_text().replace("lr:", "lt:", 1))
    job, log = submit(cluster, run, site, "--nodes=1")
    cluster.wait_for(lambda: cluster.state(job) == "FAILED", 90)
    assert "what follows" not in log.read_text()
    assert "optimizer.lt" in log.read_text()
    assert not run.directory.exists()


def test_a_node_with_fewer_gpus_than_the_first_ends_the_job_with_no_other(
    cluster: SlurmCluster, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    job, log = submit(cluster, run, site, "--nodes=2", TEST_GPUS="begin=2:n1=2:n2=1")
    cluster.wait_for(lambda: cluster.state(job) == "FAILED", 90)
    assert "has 1 GPU(s), the first node 2" in log.read_text()
    assert "ExitCode=2:0" in cluster.call("scontrol", "show", "job", job)
    assert "what follows" not in log.read_text()
    assert run.jobs() == []


def test_after_a_lost_node_the_run_goes_on_from_its_last_checkpoint(
    cluster: SlurmCluster, tiny_data: Path, tmp_path: Path, site: str
) -> None:
    run = make_run(tiny_data, tmp_path / "run", FEW_STEPS)
    job, log = submit(cluster, run, site, "--nodes=2", TEST_STEP_SECONDS="0.2")
    cluster.wait_for(lambda: run.last_step() >= 43, START_SECONDS)
    cluster.kill_node("n2")
    cluster.wait_for(lambda: cluster.state(job) == "PENDING", 120)
    cluster.start_node("n2")
    # Slurm's own two minutes pass: at once, what is left of the first start would end the second.
    cluster.wait_for(lambda: cluster.state(job) == "COMPLETED", 150 + START_SECONDS)
    assert run.ended() == "FINISHED", log.read_text()
    assert [line["step"] for line in run.jobs()] == [0, 40]
    assert sorted(run.steps()) == list(range(1, FEW_STEPS + 1))
