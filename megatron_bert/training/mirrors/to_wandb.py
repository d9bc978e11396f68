"""Metrics in Weights & Biases."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import wandb

from megatron_bert.config.load import config_dict
from megatron_bert.config.schema import Config
from megatron_bert.training.mirrors.following import Bookmark, scalars

logger = logging.getLogger(__name__)

# For the service to answer; after that the run is kept offline.
_START_SECONDS = 30.0


class WandbMirror:
    """One run in Weights & Biases, the same over the jobs of a run.

    Args:
        config: of the run.
        run_dir: where wandb keeps its files.
        bookmark: has the run's id.
    """

    def __init__(self, config: Config, run_dir: Path, bookmark: Bookmark) -> None:
        self._config, self._run_dir, self._id = config, run_dir, bookmark.run_id
        self._run = self._start()
        # Steps are numbered by the run, not by calls: a step may have two lines.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        """Hand over a line."""
        self._run.log(scalars(record))

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()

    def _start(self) -> wandb.Run:
        mode = self._config.log.wandb.mode
        if mode == "online":
            try:
                return self._init("online")
            except Exception as error:
                # Whatever it is (no key, no network, no right), the metrics can be sent later.
                logger.warning("wandb: the run is kept offline, online is not possible: %s", error)
                wandb.teardown()
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> wandb.Run:
        keys = self._config.log.wandb
        return wandb.init(
            project=keys.project,
            name=keys.name or self._run_dir.name,
            id=self._id,
            resume="allow",
            mode=mode,
            dir=self._run_dir,
            config=config_dict(self._config),
            settings=wandb.Settings(init_timeout=_START_SECONDS, console="off"),
        )
