"""RetrievaBERT-1.3B laid out for up to 5,120 ranks, on PyTorch's group that sends nothing.

Each rank's part is built as training builds it before it allocates; what the ranks that are built
hold is compared with arithmetic, and the arithmetic with the whole model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bert.config.checks import check_config
from megatron_bert.config.parameters import parameter_count, rank_parameters
from megatron_bert.config.schema import Config
from megatron_bert.distributed.topology import MESH_AXES, Topology
from megatron_bert.model.bert import TIED_PARAMETER, BertForPretraining
from megatron_bert.model.build import RankModel, lay_out_chunks
from megatron_bert.parallel.micro_batches import WholeModel
from megatron_bert.parallel.sharding import is_split_over
from tests.distributed_harness import run_ranks

VOCABULARY = 99_584
# With one key/value head, keys and values are whole on every tensor-parallel rank.
SPLIT_BY_ROWS = ("query.weight", "query.bias", "gate.weight", "gate.bias", "up.weight", "up.bias")
SPLIT_BY_COLUMNS = ("output.weight", "down.weight")
BUILDERS = 2

Interval = tuple[int, int]
Box = tuple[Interval, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A layout of so many ranks; `every_rank` is built, or one rank a model part."""

    world_size: int
    parallel: dict[str, Any]
    every_rank: bool = False

    @property
    def config(self) -> Config:
        return Config.model_validate(
            {
                "run": {"dir": "unused"},
                "model": {"preset": "retrievabert-1.3b"},
                "data": {"tokenizer": "unused", "train": [{"prefix": "unused"}]},
                "curriculum": [
                    {"seq_length": 128, "steps": 430_000},
                    {"seq_length": 2048, "steps": 24_000},
                ],
                "batch": {"global_size": 8192},
                "parallel": self.parallel,
            }
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Ranks along the axes of the mesh."""
        parallel = self.config.parallel
        pipeline, copies, tensor = parallel.pipeline, parallel.replicate, parallel.tensor
        return pipeline, copies, self.world_size // (pipeline * copies * tensor), tensor

    def rank_at(self, place: Sequence[int]) -> int:
        rank = 0
        for size, index in zip(self.sizes, place, strict=True):
            rank = rank * size + index
        return rank

    @property
    def places(self) -> list[tuple[int, int, int, int]]:
        """Where the ranks that are built stand in the mesh."""
        pipeline, copies, shards, tensor = self.sizes
        if self.every_rank:
            return list(itertools.product(*map(range, self.sizes)))
        data = [(0, 0), (0, min(1, shards - 1)), (copies // 2, shards // 2)]
        data.append((copies - 1, shards - 1))
        parts = itertools.product(range(pipeline), range(tensor))
        return [(p, *data[n % len(data)], t) for n, (p, t) in enumerate(parts)]

    def __str__(self) -> str:
        keys = (f"{key}={value}" for key, value in self.parallel.items())
        return "-".join((f"{self.world_size}-ranks", *keys))


@dataclass(frozen=True)
class Part:
    """What one rank holds and belongs to."""

    groups: dict[str, list[int]]
    data_rank: int
    boxes: dict[str, Box]
    shapes: dict[str, Shape]
    counted: int
    before_sharding: int
    layers: list[range]
    messages: list[str]
    most_elements: int


class _Watch(TorchDispatchMode):
    """Writes down messages between ranks, and the most elements of a tensor that has memory."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.most_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            self.messages.append(str(func))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.most_elements = max(self.most_elements, leaf.numel())
        return result


@contextmanager
def _without_the_harness_group() -> Iterator[tuple[int, int]]:
    """Yield (rank, number of ranks) and leave the default group free for a fake one."""
    place = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    try:
        yield place
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # The harness says goodbye through a default group.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _build_parts(case: Case) -> dict[tuple[int, int, int, int], Part]:
    """Build this process's share of the case's ranks, by their places."""
    with _without_the_harness_group() as (builder, builders):
        return {place: _build_part(case, place) for place in case.places[builder::builders]}


def _build_part(case: Case, place: tuple[int, int, int, int]) -> Part:
    config, parallel = case.config, case.config.parallel
    rank = case.rank_at(place)
    dist.init_process_group("fake", rank=rank, world_size=case.world_size, store=FakeStore())
    with _Watch() as watch:
        topology = Topology.build(
            torch.device("cpu"),
            pipeline=parallel.pipeline,
            tensor=parallel.tensor,
            replicate=parallel.replicate,
            sequence_parallel=parallel.sequence,
        )
        chunks = lay_out_chunks(config, VOCABULARY, topology)
    model = RankModel(chunks, WholeModel(chunks[0], reshard_after_forward=False), topology)
    parameters = model.named_parameters()
    tensor = parallel.tensor
    part = Part(
        groups={
            axis: dist.get_process_group_ranks(topology.mesh.get_group(axis)) for axis in MESH_AXES
        },
        data_rank=topology.data_parallel_rank,
        boxes={name: _box(parameter) for name, parameter in parameters.items()},
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        counted=sum(
            parameter.to_local().numel()
            for name, parameter in parameters.items()
            if model.counts_here(name, parameter)
        ),
        before_sharding=sum(
            parameter.numel() // (tensor if is_split_over("tp", parameter) else 1)
            for parameter in parameters.values()
        ),
        layers=[chunk.part.layers for chunk in chunks],
        messages=watch.messages,
        most_elements=watch.most_elements,
    )
    dist.destroy_process_group()
    # It keeps meshes, and with them the place of the rank that this process was.
    _clear_sharding_prop_cache()
    return part


def _box(parameter: Any) -> Box:
    """The rows and columns of the whole parameter that this rank's shard is, as a checkpoint sees
    them."""
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert tuple(shape) == tuple(parameter.to_local().shape)
    return tuple((first, first + length) for first, length in zip(offset, shape, strict=True))


def _whole_shapes(case: Case) -> dict[str, Shape]:
    with _without_the_harness_group():
        dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        tp = Topology.build(torch.device("cpu")).tensor_parallel
        with torch.device("meta"):
            model = BertForPretraining(case.config.model, VOCABULARY, tp, 0)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def whole_shapes() -> dict[str, Shape]:
    """The unsharded model's parameters."""
    (shapes,) = run_ranks(1, _whole_shapes, Case(1, {}))
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
    Case(32, {"tensor": 2, "pipeline": 4, "replicate": 2}, every_rank=True),
    Case(32, {"tensor": 8, "sequence": True, "replicate": 2}, every_rank=True),
    Case(512, {"tensor": 8}),
    Case(512, {"replicate": 16}),
    Case(640, {"tensor": 4, "pipeline": 5, "pipeline_schedule": "interleaved"}),
    Case(4096, {"tensor": 8, "pipeline": 8, "pipeline_schedule": "zero_bubble"}),
    Case(4096, {"tensor": 8, "sequence": True, "replicate": 8}),
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
        for built in run_ranks(BUILDERS, _build_parts, case, deadline_seconds=280)
        for place, part in built.items()
    }
    _check_groups(case, parts)
    _check_division_over_the_pipeline(case, parts, whole_shapes)
    _check_shards(case, parts, whole_shapes)
    for place, part in parts.items():
        assert part.messages == [], place
        # The mesh is a tensor of rank numbers; the least parameter of a rank has more elements.
        assert part.most_elements <= case.world_size, place
        assert part.before_sharding == rank_parameters(case.config, VOCABULARY)[place[0]]
    if case.every_rank:
        total = sum(part.counted for part in parts.values())
        assert total == parameter_count(case.config.model, VOCABULARY) == 1_301_388_032


def _check_groups(case: Case, parts: dict[tuple[int, int, int, int], Part]) -> None:
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
    parts: dict[tuple[int, int, int, int], Part],
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
    parts: dict[tuple[int, int, int, int], Part],
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
    with _Watch() as watch:
        dist.all_reduce(torch.ones(37))
    return watch.messages, watch.most_elements


def test_the_watch_sees_messages_and_memory() -> None:
    ((messages, most_elements),) = run_ranks(1, _watch_a_message)
    assert any("allreduce" in message for message in messages)
    assert most_elements == 37
