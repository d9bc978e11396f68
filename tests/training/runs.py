"""Runs of the real trainer on ranks of the test harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_bert.config.schema import Config
from megatron_bert.distributed.agreement import Ranks
from megatron_bert.run.directory import RunDirectory
from megatron_bert.run.metrics import read
from megatron_bert.training.stops import StopRequests
from megatron_bert.training.trainer import Trainer


def run_config(data: Path, run_dir: Path, /, *, valid: bool = True, **changes: Any) -> Config:
    """Twelve steps over two lengths and into a second epoch, every random thing switched on."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "seed": 11},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 1,
            "max_position_embeddings": 64,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": {
            "tokenizer": str(data / "tiny.model"),
            "train": [{"prefix": str(data / "train")}],
            "valid": [{"prefix": str(data / "valid")}] if valid else [],
        },
        "mlm": {"unit": "ngram"},
        "curriculum": [{"seq_length": 32, "steps": 7}, {"seq_length": 64, "steps": 5}],
        "batch": {"global_size": 12, "micro_size": 4},
        "precision": {"compute": "fp32"},
        # A tiny eps would turn a gradient that is only rounding noise into a full step.
        "optimizer": {"lr": 1e-2, "eps": 1e-4},
        "checkpoint": {"interval": 3, "keep": 10},
        "eval": {"interval": 4, "batches": 1},
        "log": {"interval": 100},
    }
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return Config.model_validate(tree)


class RunKilledError(Exception):
    """Stands for a kill -9: nothing is saved any more."""


class Stops:
    """Asks to stop after a step, or kills the run in the middle of one."""

    def __init__(self, *, stop_after: int | None = None, kill_in: int | None = None) -> None:
        self._step = 0
        self._stop_after = stop_after
        self._kill_in = kill_in
        self.seconds_to_end = 0.0

    def starting_at(self, step: int) -> Stops:
        """Tell which step the run begins after."""
        self._step = step
        return self

    def settle(self) -> None:
        """Told that the last step is saved."""

    @property
    def reason(self) -> str | None:
        """Asked once a step, when its rows are read and nothing is learned yet."""
        self._step += 1
        if self._step == self._kill_in:
            raise RunKilledError
        return "a test" if self._step == self._stop_after else None


def train(
    config: Config, stops: Stops | StopRequests | None = None, **stop: int
) -> list[dict[str, Any]]:
    """Run on this rank; return the lines of the run's `metrics.jsonl`.

    Args:
        config: Of the run.
        stops: What may stop it; by default one of our `Stops`, made of `stop`.
        stop: See `Stops`.
    """
    first = Ranks().rank == 0
    directory = RunDirectory(config.run.directory) if first else None
    try:
        trainer = Trainer(config, torch.device("cpu"), directory)
        end = trainer.run(stops or Stops(**stop).starting_at(trainer.step))
        if directory is not None and end.stop_reason is not None:
            directory.stop({"step": end.step, "reason": end.stop_reason})
    except RunKilledError:
        pass
    finally:
        if directory is not None:
            directory.close()
    metrics = config.run.directory / "metrics.jsonl"
    # A run killed in its first steps has none yet.
    return read(metrics) if first and metrics.exists() else []


def steps_of(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The training lines by step; no step may stand twice."""
    training = [line for line in lines if "loss" in line]
    by_step = {line["step"]: line for line in training}
    assert len(by_step) == len(training), "a step stands twice"
    return by_step
