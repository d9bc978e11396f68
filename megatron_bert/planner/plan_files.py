"""A plan as a document for machines, and as a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_bert.config.load import dump_config
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.plan import LayoutPlan, Plan
from megatron_bert.planner.wording import remarks

# The beginning of a configuration written by a plan.
_PLANNED_FOR = "# Layout planned for"


def document(plan: Plan, assumed: Sequence[str] = ()) -> dict[str, Any]:
    """The plan as plain values: seconds, bytes, days; takes the arguments of `describe`."""
    machine = plan.job.machine
    return {
        "machine": asdict(machine) | {"ranks": plan.job.ranks},
        "vocab_size": plan.job.vocab_size,
        "remarks": [*remarks(plan.job.config), *assumed],
        "usable_bytes": machine.usable_bytes,
        "legal": plan.legal,
        "too_large": plan.too_large,
        "best": [_layout_document(entry) for entry in plan.best],
        "alternatives": {name: _layout_document(entry) for name, entry in plan.alternatives},
        "with_little_memory_left": None if plan.tight is None else _layout_document(plan.tight),
        "of_stages": [_layout_document(entry) for entry in plan.of_stages],
    }


def configuration(plan: Plan, layout: Layout) -> str:
    """The run's configuration with a layout in it, as YAML."""
    config = layout.put_into(plan.job.config).with_keys({"parallel.layout": "manual"})
    machine = plan.job.machine
    heading = (
        f"{_PLANNED_FOR} {plan.job.ranks} x {machine.gpu.name}, {machine.gpus_per_node} a "
        f"node, {machine.network.name} (tools/plan.py).\n"
    )
    return heading + dump_config(config)


def is_written_plan(path: Path) -> bool:
    """Whether a file was written by `configuration`."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(len(_PLANNED_FOR)) == _PLANNED_FOR
    except OSError:
        return False


def _layout_document(entry: LayoutPlan) -> dict[str, Any]:
    return {
        "keys": entry.layout.keys(),
        "days": entry.days,
        "gpu_hours": entry.gpu_hours,
        "peak_bytes": entry.peak_bytes,
        "stages": [
            asdict(stage) | {"step_seconds": stage.step.total, "memory_bytes": stage.memory.total}
            for stage in entry.stages
        ],
    }
