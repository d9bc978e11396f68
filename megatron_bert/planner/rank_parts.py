"""What each pipeline rank of a split holds, counted once per job."""

from __future__ import annotations

from megatron_bert.config.parameters import RankParameters, divided_parameters
from megatron_bert.config.pipeline_schedules import PLAIN_SCHEDULE
from megatron_bert.config.pipeline_stages import stage_layers
from megatron_bert.planner.job import Job
from megatron_bert.planner.layouts import Split


def rank_parts(job: Job, split: Split) -> tuple[RankParameters, ...]:
    """Parameters and blocks of each pipeline rank."""

    def count() -> tuple[RankParameters, ...]:
        blocks = layers_of_stages(job, split.num_stages)
        model, vocab_size = job.config.model, job.vocab_size
        return divided_parameters(model, vocab_size, split.tensor, split.pipeline, blocks)

    key = ("parts", split.tensor, split.pipeline, split.virtual)
    parts: tuple[RankParameters, ...] = job.once(key, count)
    return parts


def layers_of_stages(job: Job, num_stages: int) -> tuple[int, ...]:
    """Blocks of each stage; these depend on the number of stages, not on which rank holds them."""

    def divide() -> tuple[int, ...]:
        keys = {"parallel.pipeline": num_stages, "parallel.pipeline_schedule": PLAIN_SCHEDULE}
        config = job.config.with_keys(keys)
        return tuple(len(layers) for layers in stage_layers(config, job.vocab_size))

    layers: tuple[int, ...] = job.once(("layers", num_stages), divide)
    return layers
