"""Which layouts are allowed by the number of ranks, the model, its batches and its lengths.

Everything here is arithmetic on the configuration: a layout is refused before any rank allocates
memory, and all layouts of 4,096 ranks are enumerated in some milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain

from megatron_bert.config.arithmetic import (
    VOCABULARY_MULTIPLE,
    ceil_div,
    computed_lengths,
    next_multiple,
)
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.kernels import fp8_problems, kernel_conflicts
from megatron_bert.config.pipeline_stages import num_stages, virtual_stages
from megatron_bert.config.rank_layout import RankLayout
from megatron_bert.config.remedies import (
    divisors,
    in_words,
    near_divisors,
    near_multiples,
)
from megatron_bert.config.schema import Config
from megatron_bert.words import counted

_LAYOUTS_NAMED = 3


def layout_problems(config: Config, world_size: int, vocab_size: int | None) -> list[str]:
    """Why the configuration's layout does not fit `world_size` ranks, and the nearest that do.

    Args:
        config: the whole configuration.
        world_size: ranks of the job.
        vocab_size: padded vocabulary; None if it is not known yet.

    Returns:
        A line per contradiction, the last one with layouts that work; empty if this one works.
    """
    problems = list(_contradictions(config, world_size, vocab_size))
    if problems:
        problems[-1] += f"; {_layouts_that_work(config, world_size, vocab_size)}"
    return problems


def legal_layouts(
    config: Config, world_size: int, vocab_size: int | None = None
) -> list[RankLayout]:
    """Every layout of `world_size` ranks that the configuration allows.

    The configuration's own layout is ignored; its schedule, its stages per rank and its sequence
    parallelism are kept.

    Args:
        config: the whole configuration.
        world_size: ranks of the job.
        vocab_size: padded vocabulary; None if it is not known yet, and then not checked.
    """
    return [
        RankLayout(tensor, pipeline, replicate)
        for tensor in divisors(world_size)
        for pipeline in divisors(world_size // tensor)
        if _fits(config, RankLayout(tensor, pipeline, 1), world_size, vocab_size)
        for replicate in divisors(world_size // (tensor * pipeline))
    ]


def _fits(config: Config, layout: RankLayout, world_size: int, vocab_size: int | None) -> bool:
    candidate = layout.put_into(config)
    return not any(
        chain(
            _contradictions(candidate, world_size, vocab_size),
            split_backward_problems(candidate),
            kernel_conflicts(candidate),
            fp8_problems(candidate),
        )
    )


def _contradictions(config: Config, world_size: int, vocab_size: int | None) -> Iterator[str]:
    yield from _tensor_parallel_problems(config, vocab_size)
    yield from _sequence_parallel_problems(config)
    yield from _stage_problems(config)
    yield from _world_size_problems(config, world_size)


def _tensor_parallel_problems(config: Config, vocab_size: int | None) -> Iterator[str]:
    tensor, model = config.parallel.tensor, config.model
    shared = {
        "model.num_attention_heads": (model.num_attention_heads, ""),
        "model.ffn_hidden_size": (model.ffn_hidden_size, ""),
    }
    if vocab_size is not None:
        divisible = next_multiple(vocab_size, math.lcm(VOCABULARY_MULTIPLE, tensor))
        other = f", or start the run with model.vocab_size={divisible}"
        shared["model.vocab_size"] = (vocab_size, other)
    for key, (size, other) in shared.items():
        if size % tensor:
            yield (
                f"parallel.tensor = {tensor}: does not divide {key} = {size}; "
                f"use {near_divisors(size, tensor)}{other}"
            )


def _sequence_parallel_problems(config: Config) -> Iterator[str]:
    """The length must divide, so that a micro-batch's tokens do, however many rows it has."""
    tensor = config.parallel.tensor
    if not config.parallel.sequence:
        return
    for key, length in computed_lengths(config).items():
        if length % tensor:
            yield (
                f"{key} = {length}: not divisible by parallel.tensor = {tensor}, over which "
                f"parallel.sequence shares the tokens; use {near_multiples(length, tensor)}, or "
                "parallel.sequence=false"
            )


def _stage_problems(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    stages, virtual = num_stages(config), virtual_stages(config)
    if stages <= layers:
        return
    remedies = [f"parallel.pipeline={max(1, layers // virtual)} or less"]
    what = f"parallel.pipeline = {parallel.pipeline}"
    if virtual > 1:
        what += f" x parallel.virtual_stages = {virtual}"
        if layers // parallel.pipeline >= 2:
            remedies.append(f"parallel.virtual_stages={layers // parallel.pipeline}")
        if parallel.pipeline <= layers:
            remedies.append("parallel.pipeline_schedule=1f1b")
    yield (
        f"{what}: {stages} stages, more than model.num_layers = {layers} blocks, of which each "
        f"holds one at least; use {in_words(remedies)}"
    )


def _world_size_problems(config: Config, world_size: int) -> Iterator[str]:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    model_ranks = tensor * pipeline
    if world_size % model_ranks:
        yield (
            f"parallel.tensor = {tensor} x parallel.pipeline = {pipeline}: does not divide the "
            f"{counted(world_size, 'rank')} of this job; start "
            f"{near_multiples(world_size, model_ranks)} ranks, or choose a product of "
            f"{near_divisors(world_size, model_ranks)}"
        )
        return
    data_parallel = world_size // model_ranks
    yield from _too_few_rows(config, data_parallel, model_ranks)
    if data_parallel % config.parallel.replicate:
        yield (
            f"parallel.replicate = {config.parallel.replicate}: does not divide the "
            f"{data_parallel} data-parallel ranks; "
            f"use {near_divisors(data_parallel, config.parallel.replicate)}"
        )


def _too_few_rows(config: Config, data_parallel: int, model_ranks: int) -> Iterator[str]:
    too_few: dict[str, int] = {}
    for span, stage in zip(Curriculum(config).spans, config.curriculum, strict=True):
        if span.global_size < data_parallel:
            own = stage.batch.global_size is not None
            stage_key = f"curriculum.{span.index}." if own else ""
            too_few[f"{stage_key}batch.global_size"] = span.global_size
    for key, rows in too_few.items():
        yield (
            f"{key} = {rows}: fewer than the {data_parallel} data-parallel ranks, which need a "
            f"row each; use at least {data_parallel} rows, or at most {rows * model_ranks} ranks"
        )


def split_backward_problems(config: Config) -> Iterator[str]:
    """What cannot be combined with a pipeline schedule that splits the backward pass."""
    if not config.parallel.schedule.splits_backward:
        return
    schedule = f"parallel.pipeline_schedule = {config.parallel.pipeline_schedule}"
    other = "or parallel.pipeline_schedule=interleaved"
    if config.compile.enabled:
        yield (
            f"compile.enabled = true: compiled graphs give away buffers that {schedule} needs "
            f"again for the weights' gradients; use compile.enabled=false, {other}"
        )
    if config.recompute != "none":
        yield (
            f"recompute = {config.recompute}: {schedule} would compute the activations again "
            f"twice, for the inputs' gradients and for the weights'; use recompute=none, {other}"
        )


def _layouts_that_work(config: Config, world_size: int, vocab_size: int | None) -> str:
    """The layouts nearest to the one asked for, or numbers of ranks that have any, in words."""
    near = nearest_layouts(config, world_size, vocab_size)
    if near:
        named = "; ".join(_as_keys(layout, config) for layout in near[:_LAYOUTS_NAMED])
        nearest = ", the nearest" if len(near) > _LAYOUTS_NAMED else ""
        return f"layouts of {counted(world_size, 'rank')} that work{nearest}: {named}"
    others = [
        f"{size} ({_as_keys(nearest_layouts(config, size, vocab_size)[0], config)})"
        for size in _world_sizes_that_work(config, world_size, vocab_size)
    ]
    return f"no layout of {world_size} ranks works; start {in_words(others)} ranks"


def nearest_layouts(config: Config, world_size: int, vocab_size: int | None) -> list[RankLayout]:
    """Legal layouts, nearest first; of those that differ only in `replicate`, just the nearest."""
    asked = RankLayout.of(config)
    nearest: dict[tuple[int, int], RankLayout] = {}
    for layout in sorted(legal_layouts(config, world_size, vocab_size), key=_distance_to(asked)):
        nearest.setdefault((layout.tensor, layout.pipeline), layout)
    return list(nearest.values())


def _distance_to(asked: RankLayout) -> Callable[[RankLayout], tuple[float, int, int]]:
    """The number of doublings and halvings to a layout; ties go to less communication."""

    def distance(layout: RankLayout) -> tuple[float, int, int]:
        steps = [
            abs(math.log2(getattr(layout, name) / getattr(asked, name)))
            for name in RankLayout.names()
        ]
        # Rounded, because 3 to 2 plus one doubling must equal 3 to 1.
        return round(sum(steps), 6), layout.tensor, layout.pipeline

    return distance


def _as_keys(layout: RankLayout, config: Config) -> str:
    keys = f"parallel.tensor={layout.tensor} parallel.pipeline={layout.pipeline}"
    if layout.replicate != config.parallel.replicate:
        keys += f" parallel.replicate={layout.replicate}"
    return keys


def _world_sizes_that_work(
    config: Config, world_size: int, vocab_size: int | None
) -> tuple[int, ...]:
    """The largest number of ranks up to `world_size` that has a layout, and the smallest above."""
    rows = min(span.global_size for span in Curriculum(config).spans)
    model_ranks = {
        tensor * pipeline
        for tensor in divisors(config.model.num_attention_heads)
        for pipeline in range(1, min(config.model.num_layers, world_size) + 1)
        if _fits(config, RankLayout(tensor, pipeline, 1), tensor * pipeline, vocab_size)
    }
    # One rank holds every model and every batch.
    below = max(n * min(rows, world_size // n) for n in model_ranks if n <= world_size)
    above = [next_multiple(world_size, n) for n in model_ranks if ceil_div(world_size, n) <= rows]
    return (below, min(above)) if above else (below,)
