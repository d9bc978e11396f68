"""How a layout, its keys and the numbers of a plan are written in text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bert.config.schema import Config
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.machines import GIB
from megatron_bert.planner.plan import Plan


def remarks(config: Config) -> list[str]:
    """Sentences on settings of a configuration that are planned as something else."""
    if config.precision.fp8 == "none":
        return []
    return [
        f"precision.fp8 = {config.precision.fp8} is planned as BF16: its products are faster, and "
        "a layout that suits BF16 may not be the best"
    ]


def describe_layout(layout: Layout) -> str:
    """A layout in a line."""
    split = layout.split
    words = [f"tensor {split.tensor}" + (" + sequence" if split.sequence else "")]
    if split.pipeline > 1:
        virtual = f" x {split.virtual}" if split.virtual > 1 else ""
        words.append(f"pipeline {split.pipeline} ({split.schedule}{virtual})")
    copies = f" ({layout.replicate} copies)" if layout.replicate > 1 else ""
    words.append(f"data {split.data}{copies}")
    words.append(f"micro-batches of {layout.micro_tokens:,} slots")
    if layout.reshard_after_forward:
        words.append("reshard")
    if layout.recompute != "none":
        words.append(f"recompute {layout.recompute}")
    return ", ".join(words)


def describe_key(layout: Layout, name: str) -> str:
    """One choice of a layout, as a key and its value."""
    keys = layout.keys()
    stages = f" x {keys['parallel.virtual_stages']}" if name == "parallel.pipeline_schedule" else ""
    return f"{name}={plain(keys[name])}{stages}"


def plain(value: object) -> str:
    """A key's value as written in YAML and overrides."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def significant(value: float) -> str:
    """A number to three digits, as many as a prediction is good for: `1,250,000`, `0.0443`."""
    if not value:
        return "0"
    decimals = _decimals(value)
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


@dataclass(frozen=True)
class Unit:
    """The unit in which the numbers of a column are shown.

    Attributes:
        name: of the unit.
        size: of the unit, in the base unit of the numbers: seconds, bytes.
        decimals: of each number.
    """

    name: str
    size: float
    decimals: int

    def show(self, value: float) -> str:
        """A value as a number of this unit."""
        return f"{value / self.size:,.{self.decimals}f}"


def unit_for(value: float, name: str, size: float) -> Unit:
    """A unit in which a value, the smallest of a column that matters, has three digits."""
    return Unit(name, size, max(0, _decimals(value / size)))


def time_unit(plan: Plan) -> Unit:
    """The unit for the run's time, in which the best layout's is 0.1 or more."""
    seconds = 86400 * plan.best[0].days
    sizes = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0}
    name = next((name for name, size in sizes.items() if seconds >= size / 10), "seconds")
    return unit_for(seconds, name, sizes.get(name, 1.0))


def memory_unit(plan: Plan) -> Unit:
    """The unit for memory, with the best layout's to three digits."""
    peak = plan.best[0].peak_bytes
    name, size = ("GiB", GIB) if peak >= GIB / 10 else ("MiB", 2.0**20)
    return unit_for(peak, name, size)


def _decimals(value: float) -> int:
    """Decimals for three significant digits; negative if digits before the point are rounded."""
    return 2 - math.floor(math.log10(value))
