"""A flat dict of tensors as safetensors shards, written and read by torch.distributed.checkpoint.

Whole tensors, for one process alone, are read by safetensors itself.

Each rank writes the shards it holds; a tensor that several ranks hold is written by one of them.
The header of every file says where its pieces lie in the whole tensors, so any other number of
ranks, and any other sharding, can read them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_bert.checkpoint.manifest import FileRecord
from megatron_bert.checkpoint.shard_files import ShardWriter
from megatron_bert.checkpoint.shards import LocalShards
from megatron_bert.distributed.agreement import Failure, Ranks, RanksFailedError
from megatron_bert.errors import CheckpointError

_NAMES_SHOWN = 5

_Place = tuple[slice, ...]


@dataclass(frozen=True)
class _Kind:
    """What must agree between a saved tensor and the one it is loaded into."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def total_bytes(shards: LocalShards, ranks: Ranks) -> int:
    """Return the bytes that the whole tensors of all ranks take, each counted once. Collective."""
    sizes: dict[str, int] = {}
    for part in ranks.on_all(shards.whole_bytes):
        sizes.update(part)
    return sum(sizes.values())


def write_tensors(
    folder: Path,
    shards: LocalShards,
    ranks: Ranks,
    max_file_bytes: int,
    check: Callable[[], None],
) -> dict[str, FileRecord]:
    """Write each rank's shards into `folder` and return all files' records. Collective.

    What several ranks hold is written by one of them, as DCP's planner divides it.

    Args:
        folder: Where the files go; created if need be.
        shards: What this rank holds. Pieces of one name and place must be equal on all ranks.
        ranks: The ranks that write together.
        max_file_bytes: A file is closed before it would grow beyond this, unless a single piece is
            larger.
        check: Called between any two writes; what it raises is this rank's failure.

    Raises:
        RanksFailedError: A rank could not write.
    """
    writer = ShardWriter(folder, max_file_bytes, check)
    with _dcp_errors(), _no_single_process_warning():
        save(
            dict(shards.pieces),
            storage_writer=writer,
            planner=_SavePlanner(shards),
            process_group=ranks.group,
            no_dist=not ranks.is_distributed,
        )
    records: dict[str, FileRecord] = {}
    for part in ranks.on_all(lambda: writer.records):
        records.update(part)
    return records


def read_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], ranks: Ranks, left_out: str | None = None
) -> None:
    """Fill `tensors` in place from the shards in `folder`. Collective.

    Other tensors may be there too if their names begin with `left_out`.

    Raises:
        RanksFailedError: A rank could not read, or the saved tensors are not those asked for, by
            name, shape and type.
    """
    wanted: dict[str, _Kind] = {}
    for part in ranks.on_all(
        lambda: {name: _Kind(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    ):
        wanted.update(part)
    ranks.on_first(lambda: _check_fit(folder, wanted, left_out))
    with _dcp_errors(), _no_single_process_warning():
        load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(path=str(folder)),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=not ranks.is_distributed,
        )


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every tensor that the shards in `folder` make up.

    Raises:
        CheckpointError: A shard's header cannot be read, or some part of a tensor is in no shard.
    """
    return _whole_shapes(folder, _read_metadata(folder))


def _whole_shapes(folder: Path, saved: Metadata) -> dict[str, tuple[int, ...]]:
    headers = _headers(saved)
    holes = sorted(name for name, entry in headers.items() if _has_hole(entry))
    if holes:
        raise CheckpointError(
            f"{folder}: {_list_names('incomplete in the checkpoint', holes)}; use another one"
        )
    return {name: tuple(entry.size) for name, entry in headers.items()}


def read_whole_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[torch.Tensor]:
    """Read tensors whole, one after another, fp32 on the CPU, in this process alone.

    They are read in groups that take no more memory than the largest tensor. At any time that much
    memory is held, and as much again for the mapped part of the file being read.

    Args:
        folder: The shards' folder.
        shapes: The tensors' whole shapes by name, as `saved_shapes` returns them; they come in
            this order.

    Raises:
        CheckpointError: One cannot be read, or is not there in this shape.
    """
    saved = _read_metadata(folder)
    found = _whole_shapes(folder, saved)
    others = sorted(name for name, shape in shapes.items() if found.get(name) != shape)
    if others:
        raise CheckpointError(
            f"{folder}: {_list_names('not in the checkpoint as asked for', others)}; its files "
            "changed meanwhile: use another one"
        )
    files = _places(saved)
    for names in _together(shapes):
        wholes = {name: torch.empty(shapes[name]) for name in names}
        for file, places in files.items():
            _fill(wholes, file, places)
        for name in names:
            yield wholes.pop(name)


def _fill(wholes: Mapping[str, torch.Tensor], file: Path, places: Mapping[str, _Place]) -> None:
    """Copy a file's pieces of some tensors to their places in them."""
    names = [name for name in wholes if name in places]
    if not names:
        return
    try:
        # Reopened for every group, because the mapped part of a file counts as this process'
        # memory.
        with safe_open(file, framework="pt") as pieces:
            for name in names:
                wholes[name][places[name]].copy_(pieces.get_tensor(name))
    # RuntimeError: what PyTorch raises where it cannot map the file.
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: {_list_names('cannot be read', names)} ({error}); check the disk, or use "
            "another checkpoint"
        ) from error


def _together(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    largest = max(map(math.prod, shapes.values()), default=0)
    group: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        if group and filled + math.prod(shape) > largest:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += math.prod(shape)
    if group:
        yield group


class _SavePlanner(DefaultSavePlanner):
    """Plans a save of shards whose places were noted when they were taken."""

    def __init__(self, shards: LocalShards) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards

    def create_local_plan(self) -> SavePlan:
        self.plan = self._shards.plan
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._shards.pieces[index.fqn]


def _places(saved: Metadata) -> dict[Path, dict[str, _Place]]:
    """For each file, where in the whole tensors its pieces lie."""
    files: dict[Path, dict[str, _Place]] = {}
    for index, stored in saved.storage_data.items():
        place = tuple(
            slice(begin, begin + size)
            for begin, size in zip(index.offset, stored.shape, strict=True)
        )
        files.setdefault(Path(stored.relative_path), {})[index.fqn] = place
    return files


def _headers(saved: Metadata) -> dict[str, TensorStorageMetadata]:
    """For each tensor, the pieces of it that the shards hold."""
    headers: dict[str, TensorStorageMetadata] = {}
    for name, entry in saved.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        headers[name] = entry
    return headers


def _read_metadata(folder: Path) -> Metadata:
    """Read the headers of the shards in `folder`.

    Raises:
        CheckpointError: A file is no shard, whatever the manifest says of it.
    """
    try:
        return HuggingFaceStorageReader(path=str(folder)).read_metadata()
    except (OSError, LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the shards in {folder}: {error}; use another one"
        ) from error


def _check_fit(folder: Path, wanted: Mapping[str, _Kind], left_out: str | None) -> None:
    """Check that the saved tensors are exactly `wanted`, by name, shape and type.

    Those whose names begin with `left_out` are passed over: nobody asked for them.

    DCP itself would skip an unexpected tensor, convert another type silently, and leave untouched
    what no shard covers.
    """
    kinds: dict[str, _Kind] = {}
    holes: list[str] = []
    for name, entry in _headers(_read_metadata(folder)).items():
        if left_out is not None and name.startswith(left_out):
            continue
        kinds[name] = _Kind(tuple(entry.size), entry.properties.dtype)
        if _has_hole(entry):
            holes.append(name)
    problems = [
        _list_names("not in the checkpoint", sorted(wanted.keys() - kinds.keys())),
        _list_names("only in the checkpoint", sorted(kinds.keys() - wanted.keys())),
        _list_names("incomplete in the checkpoint", sorted(holes)),
        _list_names(
            "of another kind",
            [
                f"{name} (checkpoint {kinds[name]}, model {kind})"
                for name, kind in sorted(wanted.items())
                if kinds.get(name, kind) != kind
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(
            f"{folder} does not fit the model: {'; '.join(filter(None, problems))}. "
            f"Use the model and optimizer settings it was saved with (its manifest.json holds "
            f"them), or another checkpoint"
        )


def _has_hole(entry: STORAGE_TYPES) -> bool:
    """Whether the pieces of a saved tensor do not make up the whole."""
    assert isinstance(entry, TensorStorageMetadata)
    return sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size)


def _list_names(what: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = len(names) - _NAMES_SHOWN
    more = f" and {rest} more" if rest > 0 else ""
    return f"{what}: {', '.join(names[:_NAMES_SHOWN])}{more}"


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Turn DCP's exception, which is a BaseException and hides its causes, into ours."""
    try:
        yield
    except CheckpointException as error:
        failures = [
            Failure.of(rank, cause) for rank, (cause, _trace) in sorted(error.failures.items())
        ]
        raise RanksFailedError(failures) from error


@contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """Hide DCP's warning that there is no process group, although `no_dist` asked for just that.

    With a process group it does not warn, and the warning filters are left alone: they belong to
    the whole process, and saves run in a thread of their own.
    """
    if dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
