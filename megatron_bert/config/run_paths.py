"""What stands where in a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The names in a run directory; whether anything is there is not asked.

    How the last job ended stands beside them (`run/directory.py`), and what a scheduler's jobs
    leave for each other among the logs (`jobs/going_on.py`).

    Attributes:
        root: the run directory.
    """

    root: Path

    @classmethod
    def around(cls, checkpoint: Path) -> RunPaths:
        """Those of the run that a checkpoint's folder lies in."""
        return cls(checkpoint.absolute().parent.parent)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """What it measured, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration of its last job, YAML."""
        return self.root / "config.yaml"

    @property
    def journal(self) -> Path:
        """What its jobs did, one JSON object a line."""
        return self.root / "jobs.jsonl"

    @property
    def lock(self) -> Path:
        """The file that a live job holds."""
        return self.root / "run.lock"

    @property
    def logs(self) -> Path:
        """The folder of logs, and of what else people need not look at."""
        return self.root / "logs"

    @property
    def profile(self) -> Path:
        """The folder of profiled steps."""
        return self.root / "profile"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.root / "tensorboard"
