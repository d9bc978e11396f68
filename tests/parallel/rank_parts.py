"""One rank's part of RetrievaBERT-1.3B among thousands, on PyTorch's group that sends nothing.

A part is built as training builds it before it allocates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bert.config.schema import Config
from megatron_bert.distributed.topology import MESH_AXES, Topology
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.model.build import RankModel, lay_out_chunks
from megatron_bert.parallel.micro_batches import WholeModel
from megatron_bert.parallel.sharding import is_split_over

VOCABULARY = 99_584

Interval = tuple[int, int]
Box = tuple[Interval, ...]
Shape = tuple[int, ...]
# Along the axes of the mesh.
Place = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """A layout of so many ranks; `every_rank` is built, or one or more that hold each part."""

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
    def places(self) -> list[Place]:
        """Where the ranks that are built stand in the mesh, each part of the model among them."""
        if self.every_rank:
            return list(itertools.product(*map(range, self.sizes)))
        pipeline, copies, shards, tensor = self.sizes
        data = [(0, 0), (0, min(1, shards - 1)), (copies // 2, shards // 2)]
        data.append((copies - 1, shards - 1))
        parts = itertools.product(range(pipeline), range(tensor))
        first = [(0, *place, 0) for place in data]
        return sorted({*first, *((p, *data[(p + t) % len(data)], t) for p, t in parts)})

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


class Watch(TorchDispatchMode):
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
def without_the_harness_group() -> Iterator[tuple[int, int]]:
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


def build_parts(case: Case) -> dict[Place, Part]:
    """Build this process's share of the case's ranks, by their places."""
    with without_the_harness_group() as (builder, builders):
        return {place: _build_part(case, place) for place in case.places[builder::builders]}


def _build_part(case: Case, place: Place) -> Part:
    config, parallel = case.config, case.config.parallel
    rank = case.rank_at(place)
    dist.init_process_group("fake", rank=rank, world_size=case.world_size, store=FakeStore())
    with Watch() as watch:
        topology = Topology.of(parallel, torch.device("cpu"))
        sharded = lay_out_chunks(config, VOCABULARY, topology)
    chunks = tuple(chunk.module for chunk in sharded)
    runner = WholeModel(sharded[0])
    model = RankModel(chunks, runner, topology)
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


def shapes_of_the_whole(case: Case) -> dict[str, Shape]:
    with without_the_harness_group():
        dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        tp = Topology.build(torch.device("cpu")).tensor_parallel
        with torch.device("meta"):
            model = BertForPretraining(case.config.model, VOCABULARY, tp, 0)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
