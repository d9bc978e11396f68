"""Compiled blocks: one graph for all of them, one more a change of length, the same losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_bert.config.schema import CompileConfig, Config
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train


def _train_counting_graphs(config: Config, backend: str) -> tuple[list[float], int]:
    compile_with_inductor = nn.Module.compile
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Module,
            "compile",
            lambda module, **options: compile_with_inductor(module, backend=backend, **options),
        )
        lines = steps_of(train(config))
    return [line["loss"] for line in lines.values()], _graphs()


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("world_size", "layout", "backend"),
    [
        (1, {}, "aot_eager"),
        *(
            pytest.param(ranks, layout, "aot_eager", marks=pytest.mark.slow)
            for ranks, layout in (
                (2, {}),
                (2, {"parallel": {"tensor": 2, "sequence": True}}),
                (2, {"parallel": {"pipeline": 2}}),
                (1, {"recompute": "full"}),
                (1, {"recompute": "selective"}),
            )
        ),
        pytest.param(1, {}, "inductor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_blocks_train_alike_with_one_graph_a_length(
    tiny_run: Callable[..., Config], world_size: int, layout: dict[str, Any], backend: str
) -> None:
    # Without an evaluation, whose graphs are others: no dropout, no gradient.
    changes = {**layout, "valid": False}
    plain, compiled = tiny_run("plain", **changes), tiny_run("compiled", **changes)
    compiled = compiled.model_copy(update={"compile": CompileConfig(enabled=True)})
    expected, _ = run_ranks(world_size, _train_counting_graphs, plain, backend)[0]
    losses, graphs = run_ranks(world_size, _train_counting_graphs, compiled, backend)[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert graphs == 2


def test_stages_of_one_length_share_the_graph(tiny_run: Callable[..., Config]) -> None:
    stages = [
        {"seq_length": 32, "steps": 2, "batch": {"global_size": 4}, "mlm": {"probability": 0.3}},
        {"seq_length": 32, "steps": 2, "batch": {"global_size": 8}, "lr_factor": 0.5},
        {"seq_length": 32, "steps": 2},
    ]
    config = tiny_run(curriculum=stages, valid=False, compile={"enabled": True})
    losses, graphs = run_ranks(1, _train_counting_graphs, config, "aot_eager")[0]
    assert len(losses) == 6
    assert graphs == 1
