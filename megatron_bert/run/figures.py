"""What a run measured up to one of its checkpoints, from the `metrics.jsonl` beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bert.checkpoint.huggingface_card_training import RunFigures
from megatron_bert.config.run_paths import RunPaths
from megatron_bert.run import metrics

_LAST_STEPS = 10


def run_figures(checkpoint: Path, step: int) -> RunFigures | None:
    """Read a run's figures.

    Args:
        checkpoint: the checkpoint's folder, in the `checkpoints` of its run directory.
        step: its step; what was recorded later is left out.

    Returns:
        The figures; None if there are no metrics beside the checkpoint, if they lack its step and
        so are not those of its run, or if they lack a figure.

    Raises:
        UserError: the metrics are damaged.
    """
    path = RunPaths.around(checkpoint).metrics
    if not path.is_file():
        return None
    records = [record for record in metrics.read(path) if record.get("step", 0) <= step]
    steps = [record for record in records if "loss" in record]
    if not steps or steps[-1]["step"] != step:
        return None
    try:
        return _figures(steps, records)
    except KeyError:
        # Written by another version: no figures are better than some.
        return None


def _figures(steps: list[dict[str, Any]], records: list[dict[str, Any]]) -> RunFigures:
    last = steps[-_LAST_STEPS:]
    return RunFigures(
        first_step=steps[0]["step"],
        tokens=steps[-1]["tokens"],
        masked_tokens=sum(record["masked_tokens"] for record in steps),
        seconds=sum(record["step_seconds"] for record in steps),
        skipped=sum(record.get("skipped", False) for record in steps),
        loss=sum(record["loss"] for record in last) / len(last),
        loss_steps=len(last),
        **_evaluation(records),
    )


def _evaluation(records: list[dict[str, Any]]) -> dict[str, Any]:
    evaluations = [record for record in records if "valid_loss" in record]
    if not evaluations:
        return {}
    last = evaluations[-1]
    names = ("valid_loss", "valid_accuracy", "valid_seq_length")
    return {"valid_step": last["step"], **{name: last[name] for name in names}}
