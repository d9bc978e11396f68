"""Loss and learning rate of some runs as one picture, for a README or a slide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_bert.command_line.argument_checks import checked
from megatron_bert.errors import UserError
from megatron_bert.pictures import check_name, figure_class, write_figure
from megatron_bert.report.curves import thinned
from megatron_bert.report.records import RunRecords, names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_picture(runs: Sequence[RunRecords], picture: Path) -> None:
    """Write the curves as `.svg` or `.png`, by the name's ending.

    Raises:
        UserError: the ending is another, matplotlib is missing, two runs are the same directory, or
            the file cannot be written.
    """
    check_name(picture)
    write_figure(draw_curves(runs), picture)


@checked
def draw_curves(runs: RunRecords | Sequence[RunRecords]) -> Figure:
    """Draw loss and learning rate over the steps; with one run its stages and jobs are marked.

    Args:
        runs: what `RunRecords.read` and `train` return, of one run or of several.

    Raises:
        UserError: matplotlib is missing, there is no run, or two are the same directory.
    """
    new_figure = figure_class()
    if isinstance(runs, RunRecords):
        runs = [runs]
    if not runs:
        raise UserError(f"runs = {runs!r}: give at least one run")
    figure = new_figure(figsize=(8, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for run, name in zip(runs, names_of(runs), strict=True):
        only = len(runs) == 1
        steps = thinned(run.columns["step"])
        (line,) = upper.plot(
            steps, thinned(run.columns["loss"]), linewidth=1, label="training" if only else name
        )
        if run.evaluations:
            upper.plot(
                thinned(np.array([float(e["step"]) for e in run.evaluations])),
                thinned(np.array([float(e["valid_loss"]) for e in run.evaluations])),
                color="tab:orange" if only else line.get_color(),
                linestyle="-" if only else ":",
                marker="o",
                markersize=3,
                label="held out, at the stage's length" if only else f"{name}, held out",
            )
        if "lr" in run.columns:
            colour = "tab:gray" if only else line.get_color()
            lower.plot(steps, thinned(run.columns["lr"]), color=colour)
    upper.set_ylabel("loss, nats a masked token")
    upper.legend(loc="upper right")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    if len(runs) == 1:
        _mark_stages(runs[0], (upper, lower))
        for job in runs[0].jobs[1:]:
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
