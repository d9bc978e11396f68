"""All layouts of a number of ranks: what can be chosen, and the configuration keys for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.config.checks import value_problems
from megatron_bert.config.curriculum import StageSpan
from megatron_bert.config.layout_checks import legal_layouts
from megatron_bert.config.pipeline_schedules import PLAIN_SCHEDULE, SCHEDULES, ScheduleName
from megatron_bert.config.schema import BatchConfig, Config, Recompute

# Token slots of a micro-batch. Below, products no longer fill a GPU; above, nothing is gained.
_MICRO_TOKENS = tuple(2**power for power in range(9, 18))
_VIRTUAL_STAGES = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Split:
    """How ranks share the model; the remaining factor of ranks shares rows.

    Attributes:
        tensor: `parallel.tensor`.
        sequence: `parallel.sequence`.
        pipeline: `parallel.pipeline`.
        schedule: `parallel.pipeline_schedule`.
        virtual: stages per pipeline rank; 1 if the schedule does not interleave.
        data: ranks that share rows.
    """

    tensor: int
    sequence: bool
    pipeline: int
    schedule: ScheduleName
    virtual: int
    data: int

    @property
    def num_stages(self) -> int:
        """Number of parts that the model is divided into."""
        return self.pipeline * self.virtual

    @property
    def splits_backward(self) -> bool:
        """Whether weights' gradients are computed separately from inputs'."""
        return SCHEDULES[self.schedule].splits_backward


@dataclass(frozen=True)
class Layout:
    """Everything that can be chosen without changing what is learnt.

    Attributes:
        split: how ranks share the model.
        micro_tokens: `batch.micro_tokens`.
        recompute: `recompute`.
        replicate: `parallel.replicate`.
        reshard_after_forward: `parallel.reshard_after_forward`.
    """

    split: Split
    micro_tokens: int
    recompute: Recompute
    replicate: int = 1
    reshard_after_forward: bool = False

    def keys(self) -> dict[str, Any]:
        """The configuration's keys and their values."""
        split = self.split
        keys: dict[str, Any] = {
            "parallel.tensor": split.tensor,
            "parallel.pipeline": split.pipeline,
            "parallel.sequence": split.sequence,
            "parallel.pipeline_schedule": split.schedule,
            "parallel.virtual_stages": max(2, split.virtual),
            "parallel.replicate": self.replicate,
            "parallel.reshard_after_forward": self.reshard_after_forward,
            "batch.micro_tokens": self.micro_tokens,
            "recompute": self.recompute,
        }
        return keys

    def overrides(self, config: Config) -> dict[str, Any]:
        """What to set in a configuration to get this layout; keys without effect are left out.

        Keys that would keep it from taking effect are reset.
        """
        split, keys = self.split, self.keys()
        idle = []
        if split.pipeline == 1:
            idle.append("parallel.pipeline_schedule")
        if split.virtual == 1:
            idle.append("parallel.virtual_stages")
        if split.tensor == 1:
            idle.append("parallel.sequence")
        for name in idle:
            del keys[name]
        if config.parallel.layout != "manual":
            keys["parallel.layout"] = "manual"
        if config.batch.micro_size is not None:
            keys["batch.micro_size"] = None
        return keys

    def put_into(self, config: Config) -> Config:
        """Return the configuration with this layout in place of its own."""
        return config.with_keys({**self.keys(), "batch.micro_size": None})


def all_splits(config: Config, ranks: int, vocab_size: int) -> Iterator[Split]:
    """Every legal way to share the model.

    The configuration's own layout is ignored, but whatever forbids a layout still applies: rows a
    step, `compile.enabled` with a split backward pass, sides of FP8 products.
    """
    for schedule, virtual in _schedules(config):
        for sequence in (False, True):
            asked = _with(config, schedule, virtual, sequence)
            if value_problems(asked):
                continue
            seen: set[tuple[int, int]] = set()
            for layout in legal_layouts(asked, ranks, vocab_size):
                tensor, pipeline = layout.tensor, layout.pipeline
                # One rank has no pipeline and no shared tokens, whatever the keys say.
                pointless = pipeline == 1 and schedule != PLAIN_SCHEDULE
                pointless |= tensor == 1 and sequence
                if pointless or (tensor, pipeline) in seen:
                    continue
                seen.add((tensor, pipeline))
                data = ranks // (tensor * pipeline)
                yield Split(tensor, sequence, pipeline, schedule, virtual, data)


def micro_token_choices(spans: Sequence[StageSpan], split: Split) -> Iterator[int]:
    """Micro-batch sizes that differ in how many rows a rank computes at a time.

    Args:
        spans: the curriculum's stages.
        split: how ranks share the model, and how many share rows.

    Yields:
        Sizes in token slots: of those that give the same rows in every stage, the smallest.
    """
    seen: set[tuple[int, ...]] = set()
    for micro_tokens in _MICRO_TOKENS:
        rows = tuple(
            min(
                ceil_div(span.global_size, split.data),
                BatchConfig.rows_in(micro_tokens, span.seq_length),
            )
            for span in spans
        )
        if rows not in seen:
            seen.add(rows)
            yield micro_tokens


def _schedules(config: Config) -> Iterator[tuple[ScheduleName, int]]:
    """Schedules with their stages per rank, those with one stage per rank first."""
    for virtual in (1, *_VIRTUAL_STAGES):
        if virtual > 1 and 2 * virtual > config.model.num_layers:
            continue
        for name, schedule in SCHEDULES.items():
            if schedule.interleaves == (virtual > 1):
                yield name, virtual


def _with(config: Config, schedule: ScheduleName, virtual: int, sequence: bool) -> Config:
    return config.with_keys(
        {
            # More than 1, so that whatever the pipeline's schedule refuses is noticed.
            "parallel.pipeline": 1 if schedule == PLAIN_SCHEDULE else 2,
            "parallel.pipeline_schedule": schedule,
            "parallel.virtual_stages": max(2, virtual),
            "parallel.sequence": sequence,
            # A split backward pass refuses recomputation, so such layouts are offered without it.
            "recompute": "none",
            "batch.micro_size": None,
        }
    )
