"""A run whose metrics are copied, and what arrives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from megatron_bert.run.metrics import read
from tests.deadlines import DEADLINE_SECONDS

CHECKOUT = Path(__file__).resolve().parents[3]


def line_of(step: int, **values: Any) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def copy_metrics(
    run_dir: Path, to: str, *options: str, exit_code: int = 0, **environment: str
) -> str:
    """Copy; with `--follow PID` as beside a training that has ended already."""
    command = [sys.executable, "-P", "-m", "megatron_bert.run.mirrors", str(run_dir), to]
    done = subprocess.run(
        [*command, *options],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    return done.stdout + done.stderr


def losses_and_marks(run_dir: Path) -> list[tuple[int, str, Any]]:
    """Step, name and value of each loss, stage and end of a job."""
    found: list[tuple[int, str, Any]] = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in ("stage", "job"):
                    found.append((event.step, value.tag, value.tensor.string_val[0].decode()))
                elif value.tag.endswith("/loss"):
                    found.append((event.step, value.tag, value.tensor.float_val[0]))
    return found


def train(config: Config, folder: Path, **environment: str) -> tuple[list[dict[str, Any]], str]:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "pretrain_bert.py"), "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return read(config.run.directory / "metrics.jsonl"), done.stdout + done.stderr
