"""RetrievaBERT-1.3B laid out for up to 5,120 ranks, on PyTorch's group that sends nothing.

What the ranks that are built hold is compared with arithmetic, and the arithmetic with the whole
model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from megatron_bert.config.checks import check_config
from megatron_bert.config.parameters import parameter_count, rank_parameters
from megatron_bert.distributed.topology import MESH_AXES
from megatron_bert.model.bert import TIED_PARAMETER
from tests.distributed_harness import run_ranks
from tests.parallel.rank_parts import (
    VOCABULARY,
    Box,
    Case,
    Part,
    Place,
    Shape,
    Watch,
    build_parts,
    shapes_of_the_whole,
)

# With one key/value head, keys and values are whole on every tensor-parallel rank.
SPLIT_BY_ROWS = ("query.weight", "query.bias", "gate.weight", "gate.bias", "up.weight", "up.bias")
SPLIT_BY_COLUMNS = ("output.weight", "down.weight")
BUILDERS = 2


@pytest.fixture(scope="module")
def whole_shapes() -> dict[str, Shape]:
    """The unsharded model's parameters."""
    (shapes,) = run_ranks(1, shapes_of_the_whole, Case(1, {}))
    return shapes


def _expected_box(case: Case, name: str, shape: Shape, place: Sequence[int]) -> Box:
    """The tensor-parallel rank's rows or columns, and of its rows the data-parallel rank's."""
    *_, shard, tensor_rank = place
    *_, shards, tensor = case.sizes
    first, rows, others = 0, shape[0], [(0, size) for size in shape[1:]]
    if name.endswith(SPLIT_BY_ROWS) or name in (TIED_PARAMETER, "head.bias"):
        rows //= tensor
        first = rows * tensor_rank
    elif name.endswith(SPLIT_BY_COLUMNS):
        columns = shape[1] // tensor
        others = [(columns * tensor_rank, columns * (tensor_rank + 1))]
    # As many rows as `torch.chunk` gives: later ranks may have fewer, or none.
    chunk = -(-rows // shards)
    begin, end = min(rows, shard * chunk), min(rows, (shard + 1) * chunk)
    return ((first + begin, first + end), *others)


def _tile(boxes: set[Box], shape: Shape) -> bool:
    """Whether boxes that form a grid cover every element once."""
    intervals = [sorted({box[dim] for box in boxes}) for dim in range(len(shape))]
    contiguous = all(
        edges[0][0] == 0
        and edges[-1][1] == size
        and all(left[1] == right[0] for left, right in itertools.pairwise(edges))
        for edges, size in zip(intervals, shape, strict=True)
    )
    return contiguous and len(boxes) == math.prod(map(len, intervals))


def _is_empty(box: Box) -> bool:
    return any(first == end for first, end in box)


CASES = [
    Case(
        32,
        {"tensor": 2, "pipeline": 8, "pipeline_schedule": "interleaved", "sequence": True},
        every_rank=True,
    ),
    Case(40, {"tensor": 2, "pipeline": 5}),
    Case(512, {"tensor": 4, "pipeline": 8, "sequence": True}),
    Case(4096, {"tensor": 2, "pipeline": 8, "replicate": 4}),
]
SLOW_CASES = [
    Case(32, {}, every_rank=True),
    Case(32, {"tensor": 8, "sequence": True, "replicate": 2}),
    Case(512, {"replicate": 16}),
    Case(640, {"tensor": 4, "pipeline": 5, "pipeline_schedule": "interleaved"}),
    Case(5120, {"tensor": 8, "pipeline": 5, "sequence": True, "replicate": 2}),
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_every_rank_holds_its_part_of_the_model_and_nothing_more(
    case: Case, whole_shapes: dict[str, Shape]
) -> None:
    check_config(case.config, world_size=case.world_size)
    parts = {
        place: part
        for built in run_ranks(BUILDERS, build_parts, case)
        for place, part in built.items()
    }
    _check_groups(case, parts)
    _check_division_over_the_pipeline(case, parts, whole_shapes)
    _check_shards(case, parts, whole_shapes)
    for place, part in parts.items():
        assert part.messages == [], place
        # The mesh is a tensor of rank numbers; the least parameter of a rank has more elements.
        assert part.most_elements <= case.world_size, place
        assert part.before_sharding == rank_parameters(case.config, VOCABULARY)[place[0]].total
    if case.every_rank:
        total = sum(part.counted for part in parts.values())
        assert total == parameter_count(case.config.model, VOCABULARY) == 1_301_388_032


def _check_groups(case: Case, parts: dict[Place, Part]) -> None:
    """Neighbours share tensors, then shards, then copies; a pipeline's ranks lie farthest apart."""
    for place, part in parts.items():
        for axis, name in enumerate(MESH_AXES):
            members = [
                case.rank_at((*place[:axis], index, *place[axis + 1 :]))
                for index in range(case.sizes[axis])
            ]
            assert part.groups[name] == members, (place, name)
        _, copy, shard, _ = place
        assert part.data_rank == copy * case.sizes[2] + shard


def _check_division_over_the_pipeline(
    case: Case,
    parts: dict[Place, Part],
    whole_shapes: dict[str, Shape],
) -> None:
    """All that hold a pipeline rank's part agree; the parts make up the model, its tie apart."""
    names: dict[int, set[str]] = {}
    layers: dict[int, list[range]] = {}
    for (pipeline_rank, *_), part in parts.items():
        assert names.setdefault(pipeline_rank, set(part.shapes)) == set(part.shapes)
        assert layers.setdefault(pipeline_rank, part.layers) == part.layers
        assert part.shapes == {name: whole_shapes[name] for name in part.shapes}
    last = case.sizes[0] - 1
    for name in whole_shapes:
        holders = [rank for rank in sorted(names) if name in names[rank]]
        if name == TIED_PARAMETER:
            assert holders == sorted({0, last})
        else:
            assert len(holders) == 1, name
    rounds = zip(*(layers[rank] for rank in sorted(layers)), strict=True)
    in_order = itertools.chain.from_iterable(rounds)
    assert list(itertools.chain.from_iterable(in_order)) == list(range(48))


def _check_shards(
    case: Case,
    parts: dict[Place, Part],
    whole_shapes: dict[str, Shape],
) -> None:
    """Ranks hold the shards they should, and such shards cover each parameter once."""
    for place, part in parts.items():
        for name, box in part.boxes.items():
            expected = _expected_box(case, name, whole_shapes[name], place)
            assert box == expected or (_is_empty(box) and _is_empty(expected)), (place, name)
    _, _, shards, tensor = case.sizes
    for name, shape in whole_shapes.items():
        boxes = {
            _expected_box(case, name, shape, (0, 0, shard, tensor_rank))
            for shard in range(shards)
            for tensor_rank in range(tensor)
        }
        assert _tile({box for box in boxes if not _is_empty(box)}, shape), name


def _watch_a_message() -> tuple[list[str], int]:
    with Watch() as watch:
        dist.all_reduce(torch.ones(37))
    return watch.messages, watch.most_elements


def test_the_watch_sees_messages_and_memory() -> None:
    ((messages, most_elements),) = run_ranks(1, _watch_a_message)
    assert any("allreduce" in message for message in messages)
    assert most_elements == 37
