"""How blocks are divided over a pipeline's stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bert.config.load import load_config
from megatron_bert.config.pipeline_stages import (
    EMBEDDING_BLOCKS,
    head_in_blocks,
    num_stages,
    stage_layers,
)
from megatron_bert.config.schema import Config
from tests.config.conftest import Build

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "retrievabert_1.3b.yaml"
VOCABULARY = 99_584


def counts_of(config: Config, vocab_size: int = VOCABULARY) -> list[int]:
    return [len(layers) for layers in stage_layers(config, vocab_size)]


def busiest(counts: tuple[int, ...], head: float) -> float:
    work = [float(count) for count in counts]
    work[0] += EMBEDDING_BLOCKS
    work[-1] += head
    return max(work)


def divisions(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to give each stage a block at least."""
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(end - begin for begin, end in itertools.pairwise((0, *cuts, layers)))


def test_48_layers_over_5_stages_leave_room_for_the_head() -> None:
    config = load_config(EXAMPLE, ["parallel.pipeline=5"])
    assert head_in_blocks(config, VOCABULARY) == pytest.approx(1.008, abs=0.001)
    assert counts_of(config) == [9, 10, 10, 10, 9]


@pytest.mark.parametrize(
    ("schedule", "pipeline"),
    [
        *itertools.product(["1f1b", "interleaved"], [1, 2, 3, 4, 5, 7, 8, 24]),
        ("1f1b", 48),
    ],
)
def test_stages_hold_all_blocks_in_their_order(schedule: str, pipeline: int) -> None:
    keys = [f"parallel.pipeline={pipeline}", f"parallel.pipeline_schedule={schedule}"]
    config = load_config(EXAMPLE, keys)
    layers = stage_layers(config, VOCABULARY)
    assert len(layers) == num_stages(config)
    assert [layer for stage in layers for layer in stage] == list(range(48))
    assert all(layers)


@pytest.mark.parametrize("vocab_size", [128, 8_192, 40_960])
@pytest.mark.parametrize("pipeline", [2, 3, 4])
@pytest.mark.parametrize("num_layers", [4, 6, 9, 10])
def test_no_division_has_a_busiest_stage_with_less_work(
    build: Build, num_layers: int, pipeline: int, vocab_size: int
) -> None:
    config = build(f"model.num_layers={num_layers}", f"parallel.pipeline={pipeline}")
    head = head_in_blocks(config, vocab_size)
    least = min(busiest(counts, head) for counts in divisions(num_layers, pipeline))
    assert busiest(tuple(counts_of(config, vocab_size)), head) == pytest.approx(least)
