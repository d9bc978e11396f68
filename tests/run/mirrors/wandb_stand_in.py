"""A stand-in for Weights & Biases, which writes down what it is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.run.mirrors.support import CHECKOUT, copy_metrics

# Stands for the package: what it is told is written to a file.
STAND_IN = """
import json, os, time

def told(what, **values):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps([what, values]) + "\\n")

class Run:
    def __init__(self, starting_step): self.starting_step = starting_step
    def define_metric(self, name, step_metric=None): told("metric", name=name, by=step_metric)
    def log(self, values, step):
        if step == int(os.environ.get("BLOCKS_AT", "-1")):
            time.sleep(1e6)
        told("log", at=step, **values)
    def alert(self, title, text, level): told("alert", title=title, text=text, level=level)
    def finish(self, exit_code): told("finish", code=exit_code)

class Settings:
    def __init__(self, **keys):
        stats = {key: value for key, value in keys.items() if "stats" in key}
        told("settings", **stats)

def init(*, mode, id, project, name, resume, config, **rest):
    told("init", mode=mode, id=id, project=project, name=name, resume=resume,
         layers=config["model"]["num_layers"])
    if mode == os.environ.get("REFUSED"):
        raise RuntimeError("nobody answers")
    # What the service has.
    with open(os.environ["TOLD"]) as file:
        steps = [values["at"] for what, values in map(json.loads, file) if what == "log"]
    return Run(max(steps, default=-1) + 1 if mode == "online" else 0)

def teardown(): told("teardown")
"""


def stand_in(tmp_path: Path) -> dict[str, str]:
    """Environment in which the stand-in is found and writes to a file."""
    folder = tmp_path / "stand_in"
    folder.mkdir(exist_ok=True)
    (folder / "wandb.py").write_text(STAND_IN)
    path = os.pathsep.join((str(folder), str(CHECKOUT)))
    return {"PYTHONPATH": path, "TOLD": str(tmp_path / "told")}


def read_told(tmp_path: Path) -> list[Any]:
    return [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


def tell_again(
    tmp_path: Path, run_dir: Path, *options: str, **environment: str
) -> tuple[list[Any], str]:
    """What wandb was told in one more copy, and what the copy printed."""
    before = len(read_told(tmp_path)) if (tmp_path / "told").exists() else 0
    output = copy_metrics(run_dir, "wandb", *options, **stand_in(tmp_path), **environment)
    return read_told(tmp_path)[before:], output


def of_kind(kind: str, told: list[Any]) -> list[Any]:
    return [values for what, values in told if what == kind]
