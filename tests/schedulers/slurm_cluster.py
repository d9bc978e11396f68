"""A Slurm of two nodes on this machine, for tests: real daemons, real jobs, all ended after."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2")
_START_SECONDS = 60.0
_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=20
SlurmdTimeout=15
SlurmctldPort={port}
NodeName=DEFAULT CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}]
PartitionName=tests Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP
"""


class SlurmCluster:
    """The daemons of a cluster in a folder.

    Args:
        folder: for configuration, state and logs; it must be empty.
        port: the first of four free ports.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "log", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        configuration = folder / "slurm.conf"
        configuration.write_text(
            _CONFIGURATION.format(folder=folder, port=port, first=port + 1, last=port + 2)
        )
        self._environment = {**os.environ, "SLURM_CONF": str(configuration)}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self.wait_for(lambda: self.nodes().count("idle") == len(NODES), _START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError):
            self.call("scancel", "--me", "--signal=KILL", "--full")
            self.call("scancel", "--me")
            self.wait_for(lambda: not self.call("squeue", "--noheader"), 30.0)
        for name in list(self._daemons):
            self._end(name, signal.SIGTERM)
        # What daemons that were killed have left running.
        subprocess.run(["pkill", "-KILL", "-f", str(self._folder)], check=False)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and all that it runs, as if its power had gone."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        tasks = {
            process
            for process in _processes()
            if f"SLURMD_NODENAME={node}" in _content(process, "environ")
        }
        # Those that would report their end first.
        stewards = {parent for task in tasks if (parent := _parent(task)) not in tasks}
        for process in [*(p for p in stewards if _is_steward(p)), *tasks]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Submit a job with sbatch and return its number."""
        answer = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=cwd,
            env={**self._environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it printed."""
        return subprocess.run(
            command,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()

    def nodes(self) -> list[str]:
        """Return the nodes' states."""
        return self.call("sinfo", "--noheader", "--Node", "--format=%T").split()

    def state(self, job: str) -> str:
        """Return a job's state, e.g. PENDING."""
        shown = dict(
            word.split("=", 1)
            for word in self.call("scontrol", "show", "job", "--oneliner", job).split()
            if "=" in word
        )
        return shown["JobState"]

    def wait_for(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait until something is so, at most so long."""
        deadline = time.monotonic() + seconds
        while not done():
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} has ended: {self.logs()}"
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        return "\n".join(
            f"{path.name}:\n" + "\n".join(path.read_text().splitlines()[-20:])
            for path in sorted((self._folder / "log").iterdir())
        )

    def _start_munge(self) -> None:
        if subprocess.run(["munge", "--no-input"], capture_output=True, check=False).returncode:
            subprocess.run(
                ["install", "-d", "-o", "munge", "-g", "munge", "/run/munge"], check=True
            )
            subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)

    def _start(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path="/usr/sbin:/usr/bin")
        assert program is not None, command[0]
        with (self._folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *command[1:]], env=self._environment, stdout=log, stderr=log
            )

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _content(process: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{process}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _parent(process: int) -> int:
    status = "".join(_content(process, "status"))
    found = [line.split()[1] for line in status.splitlines() if line.startswith("PPid:")]
    return int(found[0]) if found else 0


def _is_steward(process: int) -> bool:
    return "".join(_content(process, "comm")).strip() == "slurmstepd"
