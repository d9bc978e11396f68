"""A profile of some steps on request: PyTorch's trace and, on CUDA, the memory's history."""

from __future__ import annotations

import gzip
import logging
import math
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_bert.distributed.device_work import wait_for_step, work_point
from megatron_bert.files import appearing_whole, temporary_path

# The most recent allocations and frees to keep; a step of 48 layers makes some 100,000.
_MEMORY_EVENTS = 1_000_000
# A device that is still busy after this long is waiting for a rank that is gone.
_IDLE_WITHIN_SECONDS = 10.0

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the requested steps on this rank.

    Files are `steps_A_B.rank_R.trace.json.gz`, for chrome://tracing or ui.perfetto.dev, and on
    CUDA `steps_A_B.rank_R.memory.pickle`, for pytorch.org/memory_viz. A to B are the steps that
    were recorded: a job that begins or ends within the requested range records the ones that it
    took. A profile that cannot be written is logged and does not end the run.

    Args:
        steps: the steps to profile, counted from 1.
        folder: where the files go; made when they are written.
        device: this rank's device.
        taken: steps that were taken before this job.
        timeout_seconds: the longest that a step may take on the device, in case other ranks are
            lost.
    """

    def __init__(
        self,
        steps: range,
        folder: Path,
        device: torch.device,
        taken: int,
        timeout_seconds: float = math.inf,
    ) -> None:
        if steps and steps[-1] <= taken:
            logger.info(
                "warning     profile.steps: this job begins after step %s, behind them; "
                "nothing is profiled",
                f"{taken:,}",
            )
        self._steps = steps
        self._folder = folder
        self._device = device
        self._timeout = timeout_seconds
        self._recording: _Recording | None = None

    def begin(self, step: int) -> None:
        """Note that a step begins, once its rows are ready.

        Raises:
            DeviceStalledError: the device does not finish the steps before.
        """
        if step not in self._steps:
            return
        if self._recording is None:
            self._recording = _Recording(step, self._device, self._timeout)
        self._recording.begin(step)

    def is_complete(self, step: int) -> bool:
        """Whether this step, just taken, is the last one to be recorded."""
        return self._recording is not None and step + 1 not in self._steps

    def write(self) -> None:
        """Write what was recorded, if anything was; waits for the device.

        Raises:
            DeviceStalledError: it does not finish the last step.
        """
        recording = self._recording
        if recording is None:
            return
        # A device failure ends the run; a failure of the profiler itself does not.
        recording.wait()
        self._recording = None
        name = f"steps_{recording.first}_{recording.last}.rank_{dist.get_rank()}"
        try:
            recording.stop()
            self._folder.mkdir(exist_ok=True)
            recording.write(self._folder / name)
        except (OSError, RuntimeError) as error:
            logger.warning("cannot write the profile %s: %s", self._folder / name, error)
        else:
            logger.info("profile of steps %s in %s", f"{recording.first}:{recording.last}", name)
        finally:
            recording.forget()

    def close(self) -> None:
        """Stop recording; what was recorded of failed steps is not written."""
        recording, self._recording = self._recording, None
        if recording is not None and recording.is_done_soon():
            # A failed device fails here too, and the error that ended the run is already reported.
            with suppress(RuntimeError):
                recording.stop()
                recording.forget()


class OneCycleProfile(profile):
    """PyTorch's profiler for a single cycle, without its warning that it clears earlier ones.

    Asking it to keep them (`acc_events`) would avoid the warning too, but it would then turn every
    event into a Python object before the run goes on.
    """

    def start(self) -> None:
        """Begin to record."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning: Profiler clears events")
            super().start()


class _Recording:
    """A recording in progress, from construction to `stop`."""

    def __init__(self, first: int, device: torch.device, timeout_seconds: float) -> None:
        self.first = self.last = first
        self._device, self._timeout = device, timeout_seconds
        self.wait()
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(
                max_entries=_MEMORY_EVENTS, stacks="python", device=device
            )
        self._profile = OneCycleProfile(activities=activities, record_shapes=True)
        self._step: record_function | None = None
        self._profile.start()

    def begin(self, step: int) -> None:
        self._end_step()
        self.last = step
        self._step = record_function(f"step {step}")
        self._step.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self._end_step()
        self._profile.stop()

    def write(self, stem: Path) -> None:
        if self._device.type == "cuda":
            with appearing_whole(stem.with_name(f"{stem.name}.memory.pickle")) as snapshot:
                torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
        trace = stem.with_name(f"{stem.name}.trace.json.gz")
        plain = temporary_path(trace)
        try:
            self._profile.export_chrome_trace(str(plain))
            with appearing_whole(trace) as packed:
                _compress(plain, packed)
        finally:
            plain.unlink(missing_ok=True)

    def forget(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None, device=self._device)

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def is_done_soon(self) -> bool:
        """Whether the device finishes its work soon; the profiler would wait for it forever."""
        try:
            return work_point(self._device).wait(_IDLE_WITHIN_SECONDS)
        except RuntimeError:
            return False

    def wait(self) -> None:
        """Wait for the device: earlier kernels stay out of the trace, and the last ones get in."""
        wait_for_step(work_point(self._device), self._timeout)


def _compress(plain: Path, packed: Path) -> None:
    """Compress a trace; raise OSError if it is cut off: its writer does not report a full disk."""
    with plain.open("rb") as source:
        with gzip.open(packed, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target, 2**20)
        source.seek(-1, os.SEEK_END)
        if source.read() != b"}":
            raise OSError(f"{plain} is cut off; is the disk full?")
