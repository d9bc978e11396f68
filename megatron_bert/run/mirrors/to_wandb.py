"""Metrics in Weights & Biases."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import wandb

from megatron_bert.config.load import config_dict
from megatron_bert.config.schema import Config
from megatron_bert.run.directory import FINISHED, STOPPED, Outcome
from megatron_bert.run.mirrors.following import Bookmark, curves

logger = logging.getLogger(__name__)

# How long the service may take to answer; after that the run is kept offline.
_START_SECONDS = 30.0
# Also drawn against tokens, under separate names: a curve in wandb has one horizontal axis.
_BY_TOKENS = ("train/loss", "valid/loss", "valid/accuracy")


class WandbMirror:
    """One run in Weights & Biases, the same over the jobs of a run.

    Online, the service says which steps it has, and the lines after them are sent, whichever job
    wrote them. Offline, every job copies the whole run: wandb cannot continue an earlier copy, and
    of several copies of one run it would keep the one that is synchronised last.

    Args:
        config: of the run.
        run_dir: where wandb keeps its files.
        bookmark: holds only the run's id: what was handed over is not yet sent.
        training: the process that writes the lines and whose use of the machine is recorded; None
            if it is not running.
    """

    def __init__(
        self, config: Config, run_dir: Path, bookmark: Bookmark, training: int | None
    ) -> None:
        self._config, self._run_dir, self._id = config, run_dir, bookmark.run_id
        self._name = config.log.wandb.name or run_dir.name
        self._settings = wandb.Settings(
            init_timeout=_START_SECONDS,
            console="off",
            x_disable_stats=training is None,
            **({} if training is None else {"x_stats_pid": training}),
        )
        self._run = self._start()
        self._step = 0
        self._run.define_metric("step")
        self._run.define_metric("tokens", step_metric="step")
        for names in ("train/*", "valid/*", "stage/*"):
            self._run.define_metric(names, step_metric="step")
        self._run.define_metric("by_tokens/*", step_metric="tokens")

    def write(self, record: dict[str, Any], *, begins_stage: bool) -> None:
        """Hand over a line, with a mark where a stage begins."""
        self._step = record["step"]
        if self._step < self._run.starting_step:
            return
        values = curves(record)
        values["step"] = self._step
        if "tokens" in record:
            values["tokens"] = record["tokens"]
            by_tokens = {f"by_tokens/{name}": values.get(name) for name in _BY_TOKENS}
            values.update((name, value) for name, value in by_tokens.items() if value is not None)
        if begins_stage and "seq_length" in record:
            values["stage/number"] = record["stage"] + 1
            values["stage/seq_length"] = record["seq_length"]
        # A step may have two lines, which become one.
        self._run.log(values, step=self._step)

    def caught_up(self) -> None:
        """Do nothing: the service knows what it has."""

    def close(self, end: Outcome | None) -> None:
        """Wait until everything is sent; alert those concerned if the job did not finish."""
        is_clean = end is None or end.kind in (FINISHED, STOPPED)
        if end is not None and end.kind != FINISHED:
            self._run.alert(
                title=f"{self._name}: {end.kind} after step {self._step:,}",
                text=end.reason or "no reason was left",
                level="INFO" if is_clean else "ERROR",
            )
        self._run.finish(exit_code=0 if is_clean else 1)

    def _start(self) -> wandb.Run:
        if self._config.log.wandb.mode == "online":
            try:
                return self._init("online")
            except Exception as error:
                # Whatever it is (no key, no network, no right), the metrics can be sent later.
                logger.warning("wandb: the run is kept offline, online is not possible: %s", error)
                wandb.teardown()
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> wandb.Run:
        return wandb.init(
            project=self._config.log.wandb.project,
            name=self._name,
            id=self._id,
            # Offline there is nothing to resume, and wandb would warn about it.
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=self._run_dir,
            config=config_dict(self._config),
            settings=self._settings,
        )
