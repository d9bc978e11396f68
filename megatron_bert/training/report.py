"""A run's report: its curves as a picture, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bert.config.errors import UserError
from megatron_bert.config.places import check_place
from megatron_bert.training import metrics
from megatron_bert.training.progress import format_duration
from megatron_bert.training.run_directory import read_jobs, read_outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a curve; more would only be drawn over one another.
_POINTS = 400


@dataclass(frozen=True)
class RunRecords:
    """What a run directory's `metrics.jsonl` holds.

    Attributes:
        directory: the run directory.
        steps: the training lines.
        evaluations: the evaluation lines.
        jobs: the lines of `jobs.jsonl`, a job each that took steps; none where the run is of an
            earlier version.
    """

    directory: Path
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    jobs: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, directory: Path) -> RunRecords:
        """Read a run directory.

        Raises:
            UserError: it has no metrics, or no step was recorded yet.
        """
        records = metrics.read(directory / "metrics.jsonl")
        steps = [record for record in records if "loss" in record]
        if not steps:
            raise UserError(f"{directory}: no step was recorded yet; train first")
        evaluations = [r for r in records if "valid_loss" in r]
        # Those that took no step leave no trace in the curves.
        jobs = [job for job in read_jobs(directory) if job["step"] < steps[-1]["step"]]
        return cls(directory, steps, evaluations, jobs)

    def facts(self) -> dict[str, str]:
        """The run in short, as label and text."""
        first, last = self.steps[0], self.steps[-1]
        tail = [step["loss"] for step in self.steps[-10:]]
        seconds = sum(step["step_seconds"] for step in self.steps)
        facts = {
            "run directory": str(self.directory),
            "state": self._state(),
            "steps": f"{last['step']:,} of {', '.join(self._stages())}",
            "token slots": f"{last['tokens']:,}",
            "time in steps": format_duration(seconds),
            **({"set aside": ", ".join(earlier)} if (earlier := self._set_aside()) else {}),
            **({"jobs": "; ".join(map(_job_in_words, self.jobs))} if self.jobs else {}),
            "loss": f"{first['loss']:.3f} at the first step, {sum(tail) / len(tail):.3f} mean of "
            f"the last {len(tail)}",
        }
        if self.evaluations:
            valid = self.evaluations[-1]
            facts["held-out loss"] = (
                f"{valid['valid_loss']:.3f}, accuracy {valid['valid_accuracy']:.3f} "
                f"(length {valid['valid_seq_length']})"
            )
        return facts

    def stage_starts(self) -> list[tuple[int, int]]:
        """First recorded step and length of each stage."""
        return [
            (step["step"], step["seq_length"])
            for before, step in itertools.pairwise([{}, *self.steps])
            if before.get("stage") != step["stage"]
        ]

    def _stages(self) -> list[str]:
        return [f"length {length} from step {step:,}" for step, length in self.stage_starts()]

    def _set_aside(self) -> list[str]:
        """Metrics of starts that left no checkpoint to go on from."""
        return sorted(path.name for path in self.directory.glob("metrics.before-*.jsonl"))

    def _state(self) -> str:
        outcome = read_outcome(self.directory)
        if outcome is None:
            return "running, or killed"
        return outcome.kind.lower() + (f": {outcome.reason}" if outcome.reason else "")


def _job_in_words(job: Mapping[str, Any]) -> str:
    number = f"job {job['job']}, " if job["job"] else ""
    nodes = f" on {job['nodes']} nodes" if job["nodes"] > 1 else ""
    return f"{number}{job['ranks']} rank(s){nodes} from step {job['step'] + 1:,}"


def write_report(run: RunRecords, output: Path) -> None:
    """Write the HTML page.

    Raises:
        UserError: matplotlib is missing, or the page cannot be written.
    """
    rows = "\n".join(
        f"<tr><th>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>"
        for label, text in run.facts().items()
    )
    picture = _as_svg(draw_curves(run))
    config = run.directory / "config.yaml"
    settings = config.read_text("utf-8") if config.exists() else ""
    _write(
        output,
        _PAGE.format(
            title=html.escape(run.directory.name),
            rows=rows,
            picture=picture[picture.index("<svg") :],
            settings=html.escape(settings),
        ),
    )


def write_picture(run: RunRecords, output: Path) -> None:
    """Write the curves as `.svg` or `.png`, by the name's ending.

    Raises:
        UserError: the ending is another, matplotlib is missing, or the file cannot be written.
    """
    if output.suffix not in (".svg", ".png"):
        raise UserError(f"--picture {output}: give a name that ends in .svg or .png")
    figure = draw_curves(run)
    if output.suffix == ".svg":
        _write(output, _as_svg(figure))
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    _write(output, buffer.getvalue())


def draw_curves(run: RunRecords) -> Figure:
    """Draw loss and learning rate over the steps, beginnings of stages and jobs marked.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "reports need matplotlib: pip install -c constraints.txt -e '.[examples]'"
        ) from error
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    position = [step["step"] for step in run.steps]
    loss = [step["loss"] for step in run.steps]
    upper.plot(*_thinned(position, loss), color="tab:blue", linewidth=1, label="training")
    if run.evaluations:
        upper.plot(
            [e["step"] for e in run.evaluations],
            [e["valid_loss"] for e in run.evaluations],
            color="tab:orange",
            marker="o",
            markersize=3,
            label="held out, at the stage's length",
        )
    upper.set_ylabel("loss, nats a masked token")
    upper.legend(loc="upper right")
    lower.plot(*_thinned(position, [step["lr"] for step in run.steps]), color="tab:gray")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    _mark_stages(run, (upper, lower))
    for job in run.jobs[1:]:
        lower.axvline(job["step"] + 1, color="tab:red", linestyle="--", linewidth=1)
    return figure


def _mark_stages(run: RunRecords, axes: Sequence[Axes]) -> None:
    for number, (step, length) in enumerate(run.stage_starts()):
        for axis in axes:
            if number:
                axis.axvline(step, color="tab:gray", linestyle=":", linewidth=1)
        axes[0].annotate(
            f"{length}",
            (step, 0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 4),
            textcoords="offset points",
            color="tab:gray",
            fontsize=8,
            rotation=90,
        )


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over runs of neighbouring points, at most `_POINTS` of them."""
    size = -(-len(x) // _POINTS)
    parts = [slice(start, start + size) for start in range(0, len(x), size)]
    return [_mean(x[part]) for part in parts], [_mean(y[part]) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _as_svg(figure: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text, and the same run gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron_bert"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _write(path: Path, content: str | bytes) -> None:
    check_place(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from error


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
th {{ text-align: left; padding-right: 1.5rem; vertical-align: top; font-weight: normal;
     color: #666; }}
svg {{ max-width: 100%; height: auto; }}
pre {{ background: #f4f4f4; padding: 1rem; overflow: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
{rows}
</table>
{picture}
<h2>Configuration</h2>
<pre>{settings}</pre>
</body>
</html>
"""
