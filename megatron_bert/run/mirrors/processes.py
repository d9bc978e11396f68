"""Starts and ends the processes that copy a run's metrics."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import megatron_bert
from megatron_bert.config.schema import LogConfig

# More than a process takes to give up by itself.
CLOSE_WITHIN_SECONDS = 25.0

logger = logging.getLogger(__name__)


class Mirrors:
    """The processes that copy `metrics.jsonl` elsewhere, one for each place.

    They report on standard error where the copy is and what went wrong; a process that ends early
    is reported here. They end when their input is closed: when a `with` block ends, or with this
    process, however it dies. A block that ends without an error waits for what is left to be sent,
    at most `CLOSE_WITHIN_SECONDS` for all together.
    """

    def __init__(self) -> None:
        self._run_dir = Path()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._watchers: list[threading.Thread] = []

    def start(self, config: LogConfig, run_dir: Path, *, anew: bool) -> None:
        """Follow the metrics of a run; a process that cannot be started is reported, nothing more.

        Args:
            config: what is copied where.
            run_dir: the run's directory, with `config.yaml`, and without the lines of metrics
                after the step from which the run goes on.
            anew: whether the run begins at its first step.
        """
        self._run_dir = run_dir
        wanted = {"wandb": config.wandb.mode != "disabled", "tensorboard": config.tensorboard}
        for to in (to for to, is_wanted in wanted.items() if is_wanted):
            try:
                self._processes[to] = self._launch(to, anew=anew)
            except OSError as error:
                self._say_how_to_go_on(to, f"the process that sends them did not start ({error})")
                continue
            watcher = threading.Thread(target=self._watch, args=[to], daemon=True)
            watcher.start()
            self._watchers.append(watcher)

    def __enter__(self) -> Mirrors:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        if error is None:
            self._wait()

    def _launch(self, to: str, *, anew: bool) -> subprocess.Popen[bytes]:
        # Without -P, modules in the folder in which training was started would come first.
        command = [sys.executable, "-P", "-m", "megatron_bert.run.mirrors"]
        # So that it also works in a checkout that was not installed.
        root = str(Path(megatron_bert.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # Passed on, not looked up by the copy: once this process has died, the copy's parent is
        # another.
        follow = ["--follow", str(os.getpid())]
        return subprocess.Popen(
            [*command, str(self._run_dir), to, *follow, *(["--anew"] if anew else [])],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )

    def _watch(self, to: str) -> None:
        code = self._processes[to].wait()
        if code != 0:
            self._say_how_to_go_on(to, f"the process that sends them ended with exit code {code}")

    def _wait(self) -> None:
        deadline = time.monotonic() + CLOSE_WITHIN_SECONDS
        for process, watcher in zip(self._processes.values(), self._watchers, strict=True):
            watcher.join(max(deadline - time.monotonic(), 0.0))
            if watcher.is_alive():
                # With its children: it leads a session.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                watcher.join()

    def _say_how_to_go_on(self, to: str, why: str) -> None:
        logger.warning(
            "%s may lack lines of metrics.jsonl, which itself is complete: %s. Send the rest with: "
            "python -P -m megatron_bert.run.mirrors %s %s",
            to,
            why,
            self._run_dir,
            to,
        )
