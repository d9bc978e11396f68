"""Metrics as TensorBoard's event files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_bert.config.run_paths import RunPaths
from megatron_bert.run.directory import Outcome
from megatron_bert.run.mirrors.following import Bookmark, curves


class TensorBoardMirror:
    """Event files in `run.dir/tensorboard`, a new one for each job.

    Uses TensorBoard's own writer; PyTorch's wrapper would load all of PyTorch.

    Args:
        run_dir: the run's directory.
        bookmark: moved past what was written.
    """

    def __init__(self, run_dir: Path, bookmark: Bookmark) -> None:
        self._writer = EventFileWriter(str(RunPaths(run_dir).tensorboard))
        self._bookmark = bookmark

    def write(self, record: dict[str, Any], *, begins_stage: bool) -> None:
        """Write a line, and a text where a stage begins."""
        numbers = curves(record).items()
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers]
        if begins_stage and "seq_length" in record:
            values.append(_text("stage", f"stage {record['stage'] + 1}: {record['seq_length']}"))
        self._add(values, record["step"])

    def caught_up(self) -> None:
        """Write out what is buffered."""
        self._writer.flush()
        self._bookmark.keep()

    def close(self, end: Outcome | None) -> None:
        """Write how the job ended, as a text at the last step."""
        if end is not None:
            self._add([_text("job", f"{end.kind}: {end.reason}")], self._bookmark.step)
        self._writer.close()

    def _add(self, values: list[Summary.Value], step: int) -> None:
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.add_event(event)


def _text(tag: str, text: str) -> Summary.Value:
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode("utf-8", "backslashreplace")])
    return Summary.Value(tag=tag, tensor=tensor, metadata=create_summary_metadata(tag, None))
