"""Metrics as TensorBoard's event files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_bert.training.mirrors.following import scalars


class TensorBoardMirror:
    """Event files in `run.dir/tensorboard`, a new one for each job.

    TensorBoard's own writer, without PyTorch's around it, which would load all of PyTorch.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))

    def write(self, record: dict[str, Any]) -> None:
        """Write a line."""
        values = [
            Summary.Value(tag=_tag(name, record), simple_value=number)
            for name, number in scalars(record).items()
            if name != "step"
        ]
        event = Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


def _tag(name: str, record: dict[str, Any]) -> str:
    # TensorBoard groups by what stands before the slash; inner objects have one already.
    if "/" in name:
        return name
    return f"train/{name}" if "loss" in record else f"valid/{name.removeprefix('valid_')}"
