"""The timeline of a run's pipeline: which rank computes what, and when it waits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bert.config.pipeline_schedules import SCHEDULES, ScheduleName
from megatron_bert.config.yaml_text import parse_document
from megatron_bert.errors import ConfigError
from megatron_bert.parallel.actions import Action, Kind, StageTime
from megatron_bert.parallel.schedule import end_times, make_schedule, simulate

# Rounds of micro-batches to draw, of one per rank: as many as can be told apart.
_ROUNDS = 2
# Boxes per drawing; each takes some 70 bytes of the page, and more are too narrow to be seen.
_MOST_BOXES = 1200
_WIDTH, _ROW, _LEFT = 480.0, 18, 24
_CLASSES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward",
    Kind.BACKWARD_WEIGHT: "weight",
}
_WORDS = {"forward": "forward", "backward": "backward", "weight": "gradients of weights"}


@dataclass(frozen=True)
class Timeline:
    """A pipeline's timeline.

    Attributes:
        text: what it shows.
        legend: the classes of its boxes, and what they stand for.
        svg: an `<svg>` element.
    """

    text: str
    legend: tuple[tuple[str, str], ...]
    svg: str


def timeline_of(config_text: str | None) -> Timeline | None:
    """Draw the schedule of a resolved configuration, YAML.

    A forward pass takes one unit, and so does either half of a backward pass: what the stages
    really took is not recorded.

    Returns:
        The timeline, as HTML; None if the run has no pipeline, or its settings are not readable.
    """
    pipeline = _pipeline(config_text)
    if pipeline is None:
        return None
    ranks, name, virtual = pipeline
    schedule = make_schedule(name, ranks, _ROUNDS * ranks, virtual)
    idle = simulate(schedule, [StageTime()] * schedule.num_stages).idle_share
    drawn = _drawn_ranks(pipeline)
    fewer = f". Drawn is the same schedule over {drawn} ranks" if drawn < ranks else ""
    svg, kinds = _draw(name, drawn, virtual)
    return Timeline(
        f"{name} over {ranks} ranks, {_ROUNDS * ranks} micro-batches: ranks wait {idle:.0%} of the "
        f"time; the more micro-batches a step has, the less{fewer}",
        tuple((kind, _WORDS[kind]) for kind in kinds),
        svg,
    )


def _drawn_ranks(pipeline: tuple[int, ScheduleName, int]) -> int:
    """The number of a pipeline's ranks that fit into a drawing."""
    ranks, name, virtual = pipeline
    # Each micro-batch passes each stage forward and backward, in two parts in a zero bubble.
    boxes_a_round = virtual * (3 if SCHEDULES[name].splits_backward else 2)
    return min(ranks, max(2, math.isqrt(_MOST_BOXES // (_ROUNDS * boxes_a_round))))


def _draw(name: ScheduleName, ranks: int, virtual: int) -> tuple[str, list[str]]:
    """Draw a schedule; return the `<svg>` element and the classes of its boxes."""
    schedule = make_schedule(name, ranks, _ROUNDS * ranks, virtual)
    stages = [StageTime()] * schedule.num_stages
    ends = end_times(schedule, stages)
    unit = (_WIDTH - _LEFT) / max(ends.values())
    boxes = "".join(
        _box(action, end, stages[action.stage], ranks, unit) for action, end in ends.items()
    )
    labels = "".join(
        f'<text class="rank" x="{_LEFT - 6}" y="{rank * _ROW + 12}">{rank}</text>'
        for rank in range(ranks)
    )
    svg = (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {ranks * _ROW}" role="img" '
        f'aria-label="timeline of the pipeline">{labels}{boxes}</svg>'
    )
    return svg, list(dict.fromkeys(_CLASSES[action.kind] for action in ends))


def _box(action: Action, end: float, stage: StageTime, ranks: int, unit: float) -> str:
    length = stage.of(action.kind)
    # A rank's stages after its first are drawn lighter.
    later = " later" if action.stage >= ranks else ""
    return (
        f'<rect class="{_CLASSES[action.kind]}{later}" x="{_LEFT + (end - length) * unit:.1f}" '
        f'y="{action.stage % ranks * _ROW + 1}" width="{length * unit:.1f}" height="{_ROW - 2}"/>'
    )


def _pipeline(config_text: str | None) -> tuple[int, ScheduleName, int] | None:
    """Ranks, schedule and stages per rank; None if there is no pipeline."""
    try:
        tree, _ = parse_document(config_text or "", "a run's configuration")
        parallel = tree["parallel"]
        ranks, name = parallel["pipeline"], parallel["pipeline_schedule"]
        virtual = int(parallel["virtual_stages"]) if SCHEDULES[name].interleaves else 1
        return (int(ranks), name, virtual) if ranks > 1 else None
    except (ConfigError, LookupError, TypeError, ValueError):
        return None
