"""The embedding's table on a pipeline's first and last stage: one parameter held twice."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_bert.config.parameters import parameter_count
from megatron_bert.model.bert import TIED_PARAMETER
from tests.distributed_harness import run_ranks
from tests.parallel.parity import Part, build, parity_config, take_steps
from tests.small_model import VOCABULARY, cpu_topology, small_config, small_model


def _tables(data: Path) -> list[Part | None]:
    """This rank's part of the table at the beginning and after each of three steps."""
    parallel = {"pipeline": 3, "pipeline_schedule": "interleaved"}
    config = parity_config(data, model={"num_layers": 6}, parallel=parallel)
    model, optimizer = build(config)

    def table() -> Part | None:
        parameter = model.named_parameters().get(TIED_PARAMETER)
        return None if parameter is None else Part.of(parameter)

    tables = [table()]
    for step in range(1, 4):
        take_steps(config, model, optimizer, range(step, step + 1))
        tables.append(table())
    return tables


def test_both_stages_hold_the_same_table_after_every_step(tiny_data: Path) -> None:
    first, middle, last = run_ranks(3, _tables, tiny_data)
    assert middle == [None] * 4
    for a, b in zip(first, last, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.values, b.values)
    assert not torch.equal(first[0].values, first[1].values)


def _counted() -> float:
    topology = cpu_topology(pipeline=2)
    model = small_model(small_config(parallel={"pipeline": 2}), topology)
    counted = torch.tensor(
        sum(p.numel() for name, p in model.named_parameters().items() if model.counts_here(name, p))
    )
    dist.all_reduce(counted)
    return counted.item()


def test_the_table_is_counted_once() -> None:
    expected = parameter_count(small_config().model, VOCABULARY)
    assert run_ranks(2, _counted) == [expected] * 2
