"""Where things are in a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The paths in a run directory; nothing checks whether they exist.

    Not listed here: how the last job ended (`run/directory.py`), and what a scheduler's jobs leave
    for each other among the logs (`jobs/going_on.py`).

    Attributes:
        root: the run directory.
    """

    root: Path

    @classmethod
    def around(cls, checkpoint: Path) -> RunPaths:
        """The paths of the run that a checkpoint's folder is in."""
        return cls(checkpoint.absolute().parent.parent)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The run's metrics, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration of its last job, YAML."""
        return self.root / "config.yaml"

    @property
    def journal(self) -> Path:
        """What the run's jobs did, one JSON object a line."""
        return self.root / "jobs.jsonl"

    @property
    def lock(self) -> Path:
        """The file that a live job keeps locked."""
        return self.root / "run.lock"

    @property
    def logs(self) -> Path:
        """The folder of logs, and of other files that people rarely need."""
        return self.root / "logs"

    @property
    def profile(self) -> Path:
        """The folder of profiled steps."""
        return self.root / "profile"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.root / "tensorboard"
