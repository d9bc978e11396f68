"""The job scripts, with stubs for the scheduler's commands, the ranks and the project's answers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.schedulers.conftest import CHECKOUT

_SECONDS = 60.0
# A stub of each command notes its name and arguments, and then does what the test says.
_STUB = '#!/usr/bin/env bash\nprintf "%%s\\n" "%s $*" >>"$CALLS"\n%s\n'
_PYTHON = """\
case "$*" in
    *device_count*) echo "0 $PWD/megatron_bert" ;;
    *"jobs begin"*) echo "$RUN_DIR" ;;
    *"jobs judge"*) eval "${JUDGE:-echo again}" ;;
esac
"""
_GRID_ENGINE = {
    "qstat": "echo 'hard resource_list:         node_f=1,h_rt=7200'",
    "qresub": "echo 'Your job 72 (\"megatron_bert\") has been submitted'",
    "qalter": "",
    "hostname": "echo ge1",
}


class Scripts:
    """A folder of stubs, and the scripts run with them in PATH.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = folder / "calls"
        self._started: list[subprocess.Popen[str]] = []
        (folder / "bin").mkdir()
        self.stub("python", _PYTHON)
        self.stub("sleep")

    def stub(self, command: str, does: str = "") -> None:
        """Have a command note that it is called, and do what `does` says, in bash."""
        path = self._folder / "bin" / command
        path.write_text(_STUB % (command, does))
        path.chmod(0o755)

    def stub_all(self, commands: dict[str, str]) -> None:
        """Stub each of the commands by what it does."""
        for command, does in commands.items():
            self.stub(command, does)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a script of launch/ in the background."""
        job = subprocess.Popen(
            ["bash", str(CHECKOUT / "launch" / script), *arguments],
            env={
                "PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}",
                "VIRTUAL_ENV": str(self._folder),
                "CALLS": str(self._calls),
                "RUN_DIR": str(self._folder / "run"),
                **environment,
            },
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(job)
        return job

    def close(self) -> None:
        """Leave nothing of what was started."""
        for job in self._started:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            # Not read to its end: ranks in a session of their own may hold it.
            assert job.stdout is not None
            job.stdout.close()
            job.wait()

    def slurm(self, **environment: str) -> subprocess.Popen[str]:
        """Start a job of one node."""
        job = {"SLURM_JOB_ID": "71", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
        return self.start(
            "slurm.sh", "c.yaml", SLURM_SUBMIT_DIR=str(CHECKOUT), **{**job, **environment}
        )

    def grid_engine(self, **environment: str) -> subprocess.Popen[str]:
        """Start a job of one host."""
        job = {"JOB_ID": "71", "SGE_O_WORKDIR": str(CHECKOUT), "MODULES": "none"}
        return self.start("tsubame4.sh", "c.yaml", **{**job, **environment})

    def calls(self, *commands: str) -> list[str]:
        """Return the calls of these commands, each with its arguments."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [line for line in lines if line.split()[0] in commands]

    def wait_for_call(self, call: str) -> None:
        """Wait until a command was called whose line begins with `call`."""
        deadline = time.monotonic() + _SECONDS
        while not any(line.startswith(call) for line in self.calls(call.split()[0])):
            assert time.monotonic() < deadline, self.calls(call.split()[0])
            time.sleep(0.02)


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    with closing(Scripts(tmp_path)) as made:
        yield made


def output(job: subprocess.Popen[str]) -> str:
    return job.communicate(timeout=_SECONDS)[0]


def at(seconds: float) -> str:
    """What `scontrol` does for a job that ends so many seconds from now."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
    return f"""case "$*" in
    *hostnames*) echo n1 ;;
    *job*)
        [ "$SLURM_TIME_FORMAT" = standard ] || exit 1
        echo "JobId=71 JobName=x StartTime=2020-01-01T00:00:00 EndTime={end} Deadline=N/A"
        ;;
esac"""


@pytest.mark.parametrize("asked", ["-h", "--help"])
@pytest.mark.parametrize(("script", "command"), [("slurm.sh", "sbatch"), ("tsubame4.sh", "qsub")])
def test_a_script_that_is_asked_for_help_prints_how_it_is_called(
    scripts: Scripts, script: str, command: str, asked: str
) -> None:
    job = scripts.start(script, asked)
    told = output(job)
    assert job.returncode == 0
    assert f"\n  {command} " in told
    assert "docs/clusters.md" in told
    assert "#" not in told


@pytest.mark.parametrize(
    ("script", "folder", "asked"),
    [("slurm.sh", "SLURM_SUBMIT_DIR", "scontrol"), ("tsubame4.sh", "SGE_O_WORKDIR", "qstat")],
)
def test_a_script_that_was_not_submitted_says_so_and_asks_no_scheduler(
    scripts: Scripts, script: str, folder: str, asked: str
) -> None:
    scripts.stub(asked)
    job = scripts.start(script, "c.yaml", **{folder: str(CHECKOUT)})
    assert output(job).startswith("error: submit this script")
    assert job.returncode == 2
    assert not scripts.calls(asked, "python")


def test_a_slurm_job_leaves_the_margin_before_its_end(scripts: Scripts) -> None:
    scripts.stub("scontrol", at(3600))
    scripts.stub("srun", 'cat "${@: -1}"')
    told = output(scripts.slurm(SLURM_TIME_FORMAT="relative"))
    deadline = int(told.split("run.deadline=")[1].split()[0])
    assert deadline == pytest.approx(time.time() + 3600 - 180, abs=60)
    assert scripts.calls("scontrol")[-1] == "scontrol requeue 71"


def test_a_slurm_job_whose_end_is_not_told_has_no_deadline(scripts: Scripts) -> None:
    scripts.stub("scontrol", "[[ $* != *hostnames* ]] || { echo n1; exit; }; exit 1")
    scripts.stub("srun", 'cat "${@: -1}"')
    told = output(scripts.slurm())
    assert "the run stops by the signal alone" in told
    assert "run.deadline" not in told
    assert len([call for call in scripts.calls("scontrol") if "show job" in call]) == 3
    assert len(scripts.calls("srun")) == 1


def test_an_end_that_is_told_late_is_taken(scripts: Scripts) -> None:
    scripts.stub("scontrol", f'[ "$(grep -c "show job" "$CALLS")" -ge 2 ] || exit 1\n{at(3600)}')
    scripts.stub("srun", 'cat "${@: -1}"')
    told = output(scripts.slurm(RENDEZVOUS_HOST="n1"))
    assert "run.deadline=" in told
    assert "signal alone" not in told


def test_a_job_shorter_than_the_margin_is_refused_before_anything_begins(scripts: Scripts) -> None:
    scripts.stub("scontrol", at(230))
    scripts.stub("srun")
    job = scripts.slurm()
    told = output(job)
    assert job.returncode == 2
    assert "MARGIN_SECONDS=180 s earlier" in told
    assert "ask for a longer limit, or set a shorter MARGIN_SECONDS" in told
    assert not scripts.calls("python", "srun")
    assert not any("requeue" in call for call in scripts.calls("scontrol"))


@pytest.mark.parametrize("notice", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_notice_after_the_ranks_have_left_does_not_keep_the_next_job_back(
    scripts: Scripts, tmp_path: Path, notice: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "judged")
    scripts.stub("scontrol", at(3600))
    scripts.stub("srun")
    # It judges until the signal has been sent.
    job = scripts.slurm(JUDGE=f"read -r <{tmp_path / 'judged'}; echo again")
    scripts.wait_for_call("python -P -m megatron_bert.jobs judge")
    job.send_signal(notice)
    # Opened so that a reader that is gone is not waited for.
    judged = os.open(tmp_path / "judged", os.O_RDWR)
    os.write(judged, b"\n")
    told = output(job)
    os.close(judged)
    assert job.returncode == 0, told
    assert scripts.calls("scontrol")[-1] == "scontrol requeue 71"


def test_a_copy_on_grid_engine_is_held_until_it_is_announced(scripts: Scripts) -> None:
    scripts.stub_all(_GRID_ENGINE)
    job = scripts.grid_engine()
    told = output(job)
    assert job.returncode == 0, told
    assert "job 72 follows" in told
    run = "python -P -m megatron_bert.jobs announce --job {} "
    calls = scripts.calls("python", "qresub", "qalter")
    order = [run.format("any"), "qresub -h u 71", run.format(72), "qalter -hold_jid 71 72",
             "qalter -h U 72"]  # fmt: skip
    at_the_end = calls[-len(order) :]
    assert all(call.startswith(begin) for call, begin in zip(at_the_end, order, strict=True)), calls


def test_a_copy_that_cannot_be_announced_is_not_submitted(scripts: Scripts) -> None:
    scripts.stub_all(_GRID_ENGINE)
    scripts.stub("python", f"[[ $* != *announce* ]] || exit 1\n{_PYTHON}")
    job = scripts.grid_engine()
    assert "no other job can be submitted from here" in output(job)
    assert job.returncode == 1
    assert not scripts.calls("qresub")


def test_a_copy_whose_number_cannot_be_read_stays_held(scripts: Scripts) -> None:
    scripts.stub_all({**_GRID_ENGINE, "qresub": "echo 'Job submitted: 72'"})
    job = scripts.grid_engine()
    told = output(job)
    assert job.returncode == 1
    assert "it said: Job submitted: 72" in told
    assert scripts.calls("qresub") == ["qresub -h u 71"]
    assert not scripts.calls("qalter")
    announced = [call for call in scripts.calls("python") if "announce" in call]
    assert [call.split()[6] for call in announced] == ["any"]


@pytest.mark.parametrize(
    "told_limit",
    [
        "hard resource_list:         h_rt=7200,node_f=1",
        "hard resource_list:         node_f=1,h_rt=2:00:00",
        "hard_resource_list:         cpu_16=1,h_rt=02:00:00,m_mem_free=2.3G",
        "hard_resource_list 1:       h_rt=7200",
    ],
)
def test_grid_engine_may_tell_the_limit_in_several_ways(scripts: Scripts, told_limit: str) -> None:
    scripts.stub_all(_GRID_ENGINE)
    scripts.stub("qstat", f"echo '{told_limit}'")
    told = output(scripts.grid_engine())
    deadline = time.localtime(time.time() + 7200)
    assert f"the job's limit is {time.strftime('%F', deadline)}" in told
    node = next((Path(told.split("logs in ")[1].split()[0])).glob("node.sh")).read_text()
    found = int(node.split("run.deadline=")[1].split()[0])
    assert found == pytest.approx(time.time() + 7200 - 180, abs=60)


def test_without_qstat_a_signal_of_grid_engine_is_a_notice_and_another_job_follows(
    scripts: Scripts, tmp_path: Path
) -> None:
    scripts.stub_all({**_GRID_ENGINE, "qstat": "exit 1"})
    os.mkfifo(tmp_path / "pipe")
    # The ranks run until they are told to stop.
    ranks = 'trap "exit 1" TERM; echo >"$PIPE"; while :; do read -r -t 0.1 <>"$PIPE"; done'
    scripts.stub("python", f'case "$*" in *torchrun*) {ranks} ;; esac\n{_PYTHON}')
    job = scripts.grid_engine(PIPE=str(tmp_path / "pipe"))
    (tmp_path / "pipe").read_text()
    job.send_signal(signal.SIGUSR2)
    told = output(job)
    assert "tells no h_rt of this job; the run stops by the signal alone" in told
    assert "put a file HOLD into the run directory first" in told
    assert "told to stop (notice)" in told
    assert "job 72 follows" in told


@pytest.mark.parametrize(
    ("variable", "value"), [("SLURM_ARRAY_JOB_ID", "70"), ("SLURM_HET_SIZE", "2")]
)
def test_slurm_jobs_of_several_parts_are_refused(
    scripts: Scripts, variable: str, value: str
) -> None:
    job = scripts.slurm(**{variable: value})
    assert "submit with" in output(job)
    assert job.returncode == 2
    assert not scripts.calls("python")


def test_an_array_on_grid_engine_is_refused(scripts: Scripts) -> None:
    job = scripts.grid_engine(SGE_TASK_ID="1")
    assert "submit without -t" in output(job)
    assert job.returncode == 2
    assert not scripts.calls("python")


def test_the_configuration_of_a_local_run_is_the_callers(scripts: Scripts) -> None:
    # Where folders are looked for, and another checkout, are no business of the script's.
    others = {"CDPATH": f"{CHECKOUT.parent}:{CHECKOUT}", "checkout": "/nowhere"}
    job = scripts.start("local.sh", "c.yaml", "optimizer.lr=1", JUDGE="echo finished", **others)
    assert "what follows: finished" in output(job)
    (begin,) = [call for call in scripts.calls("python") if "jobs begin" in call]
    # Python stands where the caller does.
    assert "--config c.yaml " in begin
    assert begin.endswith("-- optimizer.lr=1")


@pytest.mark.parametrize(
    "setting",
    [
        {"MARGIN_SECONDS": "3m"},
        {"SAVE_SECONDS": "-1"},
        {"RESTARTS": "x"},
        {"TRIES": "0"},
        {"RANKS_PER_NODE": "two"},
        {"PORT": "99999"},
    ],
)
def test_a_setting_that_is_no_number_ends_the_job_before_anything_begins(
    scripts: Scripts, setting: dict[str, str]
) -> None:
    scripts.stub("scontrol", at(3600))
    scripts.stub("srun")
    ((name, value),) = setting.items()
    job = scripts.slurm(**setting)
    assert f"error: {name}={value}: set " in output(job)
    assert job.returncode == 2
    assert not scripts.calls("python", "srun")
    assert not any("requeue" in call for call in scripts.calls("scontrol"))


def test_what_a_person_has_to_mend_is_not_submitted_again(scripts: Scripts) -> None:
    scripts.stub("scontrol", at(3600))
    scripts.stub("srun")
    job = scripts.slurm(JUDGE="echo refused")
    assert "what follows: refused" in output(job)
    assert job.returncode == 2
    assert not any("requeue" in call for call in scripts.calls("scontrol"))


def _ranks_that_wait(scripts: Scripts, pipe: Path, on_term: str) -> None:
    """Ranks that tell by a pipe that they run, and run until they are told to stop."""
    os.mkfifo(pipe)
    ranks = f'trap "{on_term}" TERM; echo >"$PIPE"; while :; do read -r -t 0.1 <>"$PIPE"; done'
    scripts.stub("python", f'case "$*" in *torchrun*) {ranks} ;; esac\n{_PYTHON}')


def test_usr1_on_grid_engine_stops_the_ranks_and_another_job_follows(
    scripts: Scripts, tmp_path: Path
) -> None:
    scripts.stub_all(_GRID_ENGINE)
    _ranks_that_wait(scripts, tmp_path / "pipe", "exit 1")
    job = scripts.grid_engine(PIPE=str(tmp_path / "pipe"))
    (tmp_path / "pipe").read_text()
    job.send_signal(signal.SIGUSR1)
    told = output(job)
    assert "told to stop (notice)" in told
    assert "job 72 follows" in told


def test_a_second_interrupt_of_a_local_run_ends_its_ranks_at_once(
    scripts: Scripts, tmp_path: Path
) -> None:
    # They do not answer.
    _ranks_that_wait(scripts, tmp_path / "pipe", "echo >$CALLS.told")
    job = scripts.start("local.sh", "c.yaml", PIPE=str(tmp_path / "pipe"))
    (tmp_path / "pipe").read_text()
    # As an interrupt does, which a shell that was started in the background cannot be sent.
    job.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS
    while not (tmp_path / "calls.told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    told = output(job)
    assert "told to stop again: the ranks are ended at once" in told
    assert "cancelled: no other job follows" in told
    assert job.returncode == 0


def test_a_signal_just_before_the_ranks_start_reaches_them() -> None:
    script = """
        checkout=$PWD; . launch/common.sh
        node_script=x; notices=; term_signal=TERM; end=
        eval "$(declare -f run_job | sed 's/"$@" &/kill -TERM $$; "$@" \\&/')"
        run_job sleep 60; echo "$stop_reason"
    """
    done = subprocess.run(
        ["bash", "-c", script], cwd=CHECKOUT, capture_output=True, text=True, timeout=_SECONDS / 2
    )
    assert (done.returncode, done.stdout) == (0, "cancelled\n"), done.stderr
