"""Runs for real schedulers, which are installed where that is possible."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.load import dump_config
from megatron_bert.run.journal import START, read_journal
from megatron_bert.run.metrics import read
from tests.debian_packages import need_programs
from tests.training.runs import run_config

CHECKOUT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
FEW_STEPS = 60
ENDLESS = 100_000
# Sums depend on the number of threads, and ranks that share a node get fewer of them.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Python reads it as it starts. It has each step take a while, so that a run needs several jobs on a
# machine of any speed, tells of GPUs that are not there, or ends ranks at once.
_SITE = """\
import importlib.abc, importlib.util, os, socket, sys, time

class Changed(importlib.abc.MetaPathFinder):
    def __init__(self, module, change):
        self.module, self.change = module, change

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def load_and_change(module):
            load(module)
            self.change(module)
        spec.loader.exec_module = load_and_change
        return spec

def slow_down(recorder):
    add = recorder.StepRecorder.add
    def slow(*arguments):
        time.sleep(float(os.environ["TEST_STEP_SECONDS"]))
        add(*arguments)
    recorder.StepRecorder.add = slow

def count_gpus(cuda):
    counts = dict(item.split("=") for item in os.environ["TEST_GPUS"].split(":"))
    # What the script asks for on the job's first node, before it starts anything.
    begins = any("import megatron_bert," in argument for argument in sys.orig_argv)
    node = "begin" if begins else os.environ.get("SLURMD_NODENAME", socket.gethostname())
    cuda.device_count = lambda: int(counts[node])

if "TEST_STEP_SECONDS" in os.environ:
    sys.meta_path.insert(0, Changed("megatron_bert.training.recorder", slow_down))
if "TEST_GPUS" in os.environ:
    sys.meta_path.insert(0, Changed("torch.cuda", count_gpus))
if "TEST_DIE" in os.environ and "RANK" in os.environ:
    os._exit(3)
"""


@dataclass(frozen=True)
class Run:
    """A run's configuration file and directory."""

    config: Path
    directory: Path

    def steps(self) -> dict[int, dict[str, Any]]:
        """Return the training lines by step; a step that stands twice fails the test."""
        lines = [line for line in read(self.directory / "metrics.jsonl") if "loss" in line]
        steps = {line["step"]: line for line in lines}
        assert len(steps) == len(lines)
        return steps

    def last_step(self) -> int:
        """Return the newest step in the metrics, 0 where there is none."""
        path = self.directory / "metrics.jsonl"
        return max(self.steps(), default=0) if path.exists() else 0

    def jobs(self) -> list[dict[str, Any]]:
        """Return the starts in `jobs.jsonl`."""
        lines = read_journal(self.directory / "jobs.jsonl")
        return [line for line in lines if line["event"] == START]

    def ended(self) -> str | None:
        """Return which of the marker files lies there."""
        names = ("FINISHED", "STOPPED", "FAILED")
        return next((name for name in names if (self.directory / name).exists()), None)

    def compare(self, uncut: Run, same_bits_until: int | None = None) -> None:
        """Check that rows and losses are those of an uncut run.

        Args:
            uncut: that one.
            same_bits_until: the last step on the layout of `uncut`; None for all steps.
        """
        steps, expected = self.steps(), uncut.steps()
        assert steps.keys() == expected.keys()
        for number, line in steps.items():
            assert line["batch_hash"] == expected[number]["batch_hash"]
            if same_bits_until is None or number <= same_bits_until:
                assert line["loss"] == expected[number]["loss"]
            assert line["loss"] == pytest.approx(expected[number]["loss"], rel=1e-5)


def make_run(data: Path, folder: Path, steps: int) -> Run:
    """Write the configuration of a run of two lengths over some epochs."""
    folder.mkdir(parents=True)
    config = run_config(
        data,
        folder / "run",
        valid=False,
        curriculum=[{"seq_length": 32, "steps": steps - 10}, {"seq_length": 64, "steps": 10}],
        checkpoint={"interval": 40, "keep": 100},
        log={"interval": 20},
        # At ten times the rate rounding, which is another on other layouts, grows to 1 % of the
        # loss within 30 steps.
        optimizer={"lr": 1e-3},
    )
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return Run(path, folder / "run")


def train_uncut(run: Run, ranks: int) -> None:
    """Train a run in one go, on this machine."""
    subprocess.run(
        ["bash", str(CHECKOUT / "launch" / "local.sh"), str(run.config)],
        env={**os.environ, **ONE_THREAD, "RANKS_PER_NODE": str(ranks)},
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH.

    TEST_STEP_SECONDS slows steps down; TEST_GPUS, as begin=4:NODE=3, tells of GPUs; TEST_DIE ends
    ranks.
    """
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(_SITE)
    return str(folder)


def need_scheduler(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install Debian's packages where the programs are missing; skip where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("a scheduler's daemons need root")
    need_programs(programs, packages)
