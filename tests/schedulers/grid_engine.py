"""A Grid Engine of two hosts on this machine, for tests.

Grid Engine knows hosts by name and address, so each gets a network namespace of its own, the two
joined by a pair of virtual interfaces, and a hosts file that names both.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HOSTS = {"ge1": "10.213.7.1", "ge2": "10.213.7.2"}
_MASTER = "ge1"
_CELL = Path("/var/lib/gridengine/default/common")
_START_SECONDS = 60.0
_EXECUTION_HOST = """\
hostname              {host}
load_scaling          NONE
complex_values        slots=2,node_f=2
user_lists            NONE
xuser_lists           NONE
projects              NONE
xprojects             NONE
usage_scaling         NONE
report_variables      NONE
"""
_HOST_GROUP = "group_name @allhosts\nhostlist {hosts}\n"
_PARALLEL_ENVIRONMENT = """\
pe_name            mpi_f
slots              999
user_lists         NONE
xuser_lists        NONE
start_proc_args    NONE
stop_proc_args     NONE
allocation_rule    2
control_slaves     TRUE
job_is_first_task  FALSE
urgency_slots      min
accounting_summary FALSE
qsort_args         NONE
"""
_UNLIMITED = ["rt", "cpu", "fsize", "data", "stack", "core", "rss", "vmem"]
_QUEUE = """\
qname                 main.q
hostlist              @allhosts
seq_no                0
load_thresholds       NONE
suspend_thresholds    NONE
nsuspend              1
suspend_interval      00:05:00
priority              0
min_cpu_interval      00:05:00
processors            UNDEFINED
qtype                 BATCH INTERACTIVE
ckpt_list             NONE
pe_list               mpi_f
rerun                 TRUE
slots                 2
tmpdir                /tmp
shell                 /bin/bash
prolog                NONE
epilog                NONE
shell_start_mode      posix_compliant
starter_method        NONE
suspend_method        NONE
resume_method         NONE
terminate_method      NONE
notify                00:00:20
owner_list            NONE
user_lists            NONE
xuser_lists           NONE
subordinate_list      NONE
complex_values        NONE
projects              NONE
xprojects             NONE
calendar              NONE
initial_state         default
""" + "".join(f"{kind}_{limit} INFINITY\n" for limit in _UNLIMITED for kind in "sh")


class GridEngine:
    """The daemons of a Grid Engine with two execution hosts.

    Args:
        folder: for configuration and logs; it must be empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> GridEngine:
        try:
            self._make_hosts()
            self._start_master()
            # Jobs of a test that was killed would run before this one's.
            self._delete_jobs()
            for host in HOSTS:
                self.start_host(host)
            self.wait_for(lambda: self._hosts_up() == len(HOSTS), _START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._delete_jobs()
        with suppress(subprocess.SubprocessError):
            self.call("qconf", "-ke", "all")
            self.call("qconf", "-km")
            self.wait_for(lambda: not _running("sge_qmaster"), 20.0)
        for host in HOSTS:
            _kill_all(host)
            _shell(f"ip netns delete {host} 2>/dev/null; rm -rf /etc/netns/{host}")

    def _delete_jobs(self) -> None:
        with suppress(subprocess.SubprocessError):
            self.call("qdel", "-f", "-u", "*")

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Submit a job with qsub and return its number."""
        variables = [part for item in environment.items() for part in ("-v", "=".join(item))]
        answer = self.call("qsub", "-terse", *variables, *arguments, cwd=cwd)
        return answer.strip()

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Run one of Grid Engine's commands on the master's host and return what it printed."""
        result = subprocess.run(
            _on(_MASTER, *command),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if result.returncode:
            raise subprocess.CalledProcessError(
                result.returncode, command, result.stdout, result.stderr
            )
        return result.stdout

    def start_host(self, host: str) -> None:
        """Start a host's daemon."""
        subprocess.run(_on(host, "sge_execd"), check=True, capture_output=True, timeout=60)

    def kill_host(self, host: str) -> None:
        """Kill a host's daemon and all that it runs, as if its power had gone; not the master's."""
        assert host != _MASTER
        _kill_all(host)

    def jobs(self) -> list[str]:
        """Return the numbers of the jobs that wait or run."""
        return [line.split()[0] for line in self.call("qstat").splitlines()[2:]]

    def wait_for(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait until something is so, at most so long."""
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.call("qstat", "-f")
            time.sleep(0.2)

    def _make_hosts(self) -> None:
        names = "".join(f"{address} {host}\n" for host, address in HOSTS.items())
        for host in HOSTS:
            folder = Path("/etc/netns") / host
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            _shell(f"ip netns add {host}")
        first, second = HOSTS
        _shell(f"ip link add {first} netns {first} type veth peer name {second} netns {second}")
        for host, address in HOSTS.items():
            _shell(f"ip -n {host} addr add {address}/24 dev {host}")
            _shell(f"ip -n {host} link set {host} up && ip -n {host} link set lo up")

    def _start_master(self) -> None:
        (_CELL / "act_qmaster").write_text(f"{_MASTER}\n")
        subprocess.run(_on(_MASTER, "sge_qmaster"), check=True, capture_output=True, timeout=60)
        self.wait_for(lambda: _works(lambda: self.call("qconf", "-sh")), _START_SECONDS)
        # TSUBAME's name for whole nodes; here the slots of a parallel environment make them up.
        kinds = self.call("qconf", "-sc").splitlines()
        kinds = [line for line in kinds if not line.startswith(("node_f", "#"))]
        self._define("-Mc", "-Mc", "\n".join([*kinds, "node_f nf INT <= YES YES 0 0", ""]))
        for host in HOSTS:
            self.call("qconf", "-ah", host)
            self.call("qconf", "-as", host)
            self._define("-Ae", "-Me", _EXECUTION_HOST.format(host=host))
        self._define("-Ahgrp", "-Mhgrp", _HOST_GROUP.format(hosts=" ".join(HOSTS)))
        self._define("-Ap", "-Mp", _PARALLEL_ENVIRONMENT)
        self._define("-Aq", "-Mq", _QUEUE)
        settings = self.call("qconf", "-sconf").splitlines()
        settings = [line for line in settings if not line.startswith(("min_uid", "min_gid", "#"))]
        self._define(
            "-Mconf", "-Mconf", "\n".join([*settings, "min_uid 0", "min_gid 0", ""]), "global"
        )

    def _define(self, add: str, modify: str, text: str, name: str = "definition") -> None:
        path = self._folder / name
        path.write_text(text)
        try:
            self.call("qconf", add, str(path))
        except subprocess.CalledProcessError:
            # It stands there from another time.
            self.call("qconf", modify, str(path))

    def _hosts_up(self) -> int:
        # A host that has not reported has no load.
        lines = self.call("qhost").splitlines()
        return sum(line.split()[0] in HOSTS and line.split()[3] != "-" for line in lines)


def _on(host: str, *command: str) -> list[str]:
    """A command on a host: its network, its hosts file, its name."""
    script = 'hostname "$0" && exec "$@"'
    return ["ip", "netns", "exec", host, "unshare", "--uts", "bash", "-c", script, host, *command]


def _kill_all(host: str) -> None:
    for process in _shell(f"ip netns pids {host} 2>/dev/null").split():
        subprocess.run(["kill", "-KILL", process], check=False, capture_output=True)


def _shell(command: str) -> str:
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    ).stdout


def _running(program: str) -> bool:
    return (
        subprocess.run(["pgrep", "-x", program], capture_output=True, check=False).returncode == 0
    )


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except subprocess.SubprocessError:
        return False
    return True
