"""What a run directory tells of a run, read without torch and in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_bert.command_line.argument_checks import checked
from megatron_bert.config.run_paths import RunPaths
from megatron_bert.errors import UserError
from megatron_bert.files import StrPath
from megatron_bert.locks import holder_lives
from megatron_bert.run import metrics
from megatron_bert.run.directory import FAILED, Outcome, read_outcome
from megatron_bert.run.journal import START, read_journal
from megatron_bert.words import counted, format_duration

Floats: TypeAlias = NDArray[np.float64]
# The most jobs that the facts name.
_MOST_JOBS = 10


@dataclass(frozen=True)
class Remark:
    """A step whose numbers went wrong.

    Attributes:
        step: its number.
        kind: `skipped` or `spike`.
        rows: first and last row number of its batch; None where the line lacks them.
    """

    step: int
    kind: str
    rows: tuple[int, int] | None


@dataclass(frozen=True)
class RunRecords:
    """What a run directory holds.

    Attributes:
        directory: the run directory.
        columns: the numbers of the training lines by name, each with one entry per line; NaN where
            a line lacks it. Always there: `step`, `stage`, `seq_length`, `loss`.
        evaluations: the evaluation lines.
        journal: the lines of `jobs.jsonl`, in the order in which it happened.
        remarks: steps that were skipped, and spikes.
        torn: whether the metrics end in a line that a killed job left half-written.
        outcome: how the last job ended; None: it runs, or was killed.
        is_live: whether the process of that job lives; None if that cannot be told from here.
    """

    directory: Path
    columns: Mapping[str, Floats]
    evaluations: Sequence[Mapping[str, Any]] = ()
    journal: Sequence[Mapping[str, Any]] = ()
    remarks: Sequence[Remark] = ()
    torn: bool = False
    outcome: Outcome | None = None
    is_live: bool | None = None

    @classmethod
    @checked
    def read(cls, directory: StrPath) -> RunRecords:
        """Read a run directory.

        Raises:
            UserError: there is none, it has no metrics or damaged ones, or no step was recorded
                yet.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such run directory; give the run.dir of a run")
        table = _Table()
        paths = RunPaths(directory)
        path = paths.metrics
        if not path.exists():
            _check_failure(directory)
        for number, record in enumerate(metrics.stream(path), start=1):
            for name in _lacking(record or {"step": number}):
                raise UserError(f"{path} line {number}: no number `{name}`; remove the line")
            table.add(record)
        if not table.length:
            _check_failure(directory)
            raise UserError(f"{directory}: no step was recorded yet; train first")
        columns = table.arrays()
        # Read before the outcome, which a job leaves before its process ends.
        is_live = holder_lives(paths.lock)
        return cls(
            directory,
            columns,
            table.evaluations,
            read_journal(paths.journal),
            table.remarks,
            table.torn,
            read_outcome(directory),
            is_live,
        )

    @property
    def last_step(self) -> int:
        """Number of the last recorded step."""
        return int(self.columns["step"][-1])

    @property
    def jobs(self) -> list[Mapping[str, Any]]:
        """The starts of the jobs whose steps are in the curves.

        Jobs that took no step are left out, and so are those whose steps were taken again by a
        later job that began at the same step or before.
        """
        jobs: list[Mapping[str, Any]] = []
        for job in self.journal:
            if job["event"] == START and job["step"] < self.last_step:
                jobs = [earlier for earlier in jobs if earlier["step"] < job["step"]]
                jobs.append(job)
        return jobs

    def seconds(self) -> Floats:
        """Time spent in steps up to each one, seconds; a step without a time adds 0."""
        unknown = np.full(len(self.columns["step"]), np.nan)
        return np.cumsum(np.nan_to_num(self.columns.get("step_seconds", unknown)))

    def stage_starts(self) -> list[tuple[int, int]]:
        """First recorded step and length of each stage."""
        stages = self.columns["stage"]
        firsts = np.flatnonzero(np.concatenate(([True], stages[1:] != stages[:-1])))
        return [
            (int(self.columns["step"][at]), int(self.columns["seq_length"][at])) for at in firsts
        ]

    def set_aside(self) -> list[str]:
        """Names of the metrics of starts that left no checkpoint to go on from."""
        return sorted(path.name for path in self.directory.glob("metrics.before-*.jsonl"))

    def config_text(self) -> str | None:
        """The resolved configuration, YAML; None if there is none."""
        try:
            return RunPaths(self.directory).config.read_text("utf-8", errors="replace")
        except OSError:
            return None

    def facts(self) -> dict[str, str]:
        """The run in short, as label and text."""
        loss = self.columns["loss"]
        tail = loss[-10:]
        facts = {
            "run directory": str(self.directory),
            "state": self._state(),
            "steps": f"{self.last_step:,} of {', '.join(self._stages())}",
        }
        if "tokens" in self.columns:
            facts["token slots"] = f"{int(np.nanmax(self.columns['tokens'])):,}"
        if "step_seconds" in self.columns:
            facts["time in steps"] = format_duration(self.seconds()[-1])
        if earlier := self.set_aside():
            facts["set aside"] = ", ".join(earlier)
        if self.jobs:
            facts["jobs"] = _jobs_in_words(self.jobs)
        facts["loss"] = (
            f"{loss[0]:.3f} at the first step, {tail.mean():.3f} mean of the last {len(tail)}"
        )
        if self.evaluations:
            valid = self.evaluations[-1]
            facts["held-out loss"] = (
                f"{valid['valid_loss']:.3f}, accuracy {valid['valid_accuracy']:.3f} "
                f"(length {valid['valid_seq_length']})"
            )
        return facts

    def _stages(self) -> list[str]:
        return [f"length {length} from step {step:,}" for step, length in self.stage_starts()]

    def _state(self) -> str:
        if self.outcome is None:
            states = {True: "running", False: "killed", None: "running, or killed"}
            return states[self.is_live]
        reason = f": {self.outcome.reason}" if self.outcome.reason else ""
        return self.outcome.kind.lower() + reason


def _check_failure(directory: Path) -> None:
    """Raise `UserError` if a run without a step has failed, saying why."""
    failed = read_outcome(directory)
    if failed is not None and failed.kind == FAILED:
        raise UserError(
            f"{directory}: no step was recorded, for the run failed: {failed.reason}\n"
            "mend that and train first"
        )


def _jobs_in_words(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first and the last jobs; a run's hundreds of jobs would fill the page."""
    words = [job_in_words(job) for job in jobs]
    if len(words) > _MOST_JOBS:
        half = _MOST_JOBS // 2
        words = [*words[:half], f"{len(words) - 2 * half:,} more", *words[-half:]]
    return "; ".join(words)


def job_in_words(job: Mapping[str, Any]) -> str:
    """Describe a job of `jobs.jsonl` by its number, size and first step."""
    number = f"job {job['job']}, " if job["job"] else ""
    nodes = f" on {counted(job['nodes'], 'node')}" if job["nodes"] > 1 else ""
    return f"{number}{counted(job['ranks'], 'rank')}{nodes} from step {job['step'] + 1:,}"


def names_of(runs: Iterable[RunRecords]) -> list[str]:
    """A short name for each run: the end of its directory's path that no other one shares.

    Raises:
        UserError: two are the same directory.
    """
    paths = [run.directory.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path}: given twice; name each run directory once")
    return [_short_name(path, paths) for path in paths]


def _short_name(path: Path, paths: Sequence[Path]) -> str:
    for count in range(1, len(path.parts)):
        end = path.parts[-count:]
        if sum(other.parts[-count:] == end for other in paths) == 1:
            return str(Path(*end))
    return str(path)


def _lacking(record: Mapping[str, Any]) -> list[str]:
    """Required numbers that a line of the metrics lacks."""
    needed = ["step"]
    if "loss" in record:
        needed += ["stage", "seq_length", "loss"]
    elif "valid_loss" in record:
        needed += ["valid_loss", "valid_accuracy", "valid_seq_length"]
    return [name for name in needed if not isinstance(record.get(name), int | float)]


@dataclass
class _Table:
    """Collects a metrics file's lines, the training lines' numbers as columns of floats."""

    length: int = 0
    columns: dict[str, array[float]] = field(default_factory=dict)
    evaluations: list[Mapping[str, Any]] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    torn: bool = False

    def add(self, record: Mapping[str, Any] | None) -> None:
        """Add a line; None stands for a torn one."""
        if record is None:
            self.torn = True
        elif "loss" in record:
            self._add_step(record)
        elif "valid_loss" in record:
            self.evaluations.append(record)

    def _add_step(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = array("d")
            self._fill(column)
            column.append(value)
        self.length += 1
        for kind, found in (("skipped", record.get("skipped")), ("spike", "spike_limit" in record)):
            if found:
                rows = record.get("rows")
                self.remarks.append(Remark(record["step"], kind, rows and (rows[0], rows[-1])))

    def _fill(self, column: array[float]) -> None:
        """Pad a column to the others' length: the lines before this one lacked it."""
        if missing := self.length - len(column):
            column.extend([np.nan] * missing)

    def arrays(self) -> dict[str, Floats]:
        """The columns, all of one length."""
        for column in self.columns.values():
            self._fill(column)
        return {name: np.frombuffer(column) for name, column in self.columns.items()}
