"""How long a save stops training, how long it takes in all, and how long loading takes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bert.benchmark.machine import Hardware, describe_hardware, describe_versions
from megatron_bert.benchmark.process import run_isolated
from megatron_bert.benchmark.timing import Timing
from megatron_bert.checkpoint.manifest import Manifest
from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.schema import Config
from megatron_bert.distributed.launch import new_host_group, process_group
from megatron_bert.distributed.topology import Topology
from megatron_bert.errors import CheckpointError, DataError
from megatron_bert.model.build import build_model
from megatron_bert.parallel.sharding import local_part
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.runtime import keep_freed_memory
from megatron_bert.training.state import state_tensors

_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class CheckpointWork:
    """The model whose state is saved.

    Attributes:
        layers: blocks.
        hidden_size: width; a head has 64 channels, the feed-forward part 2.75 times the width.
        vocab_size: rows of the embedding table.
        repetitions: number of repetitions of each measurement.
    """

    layers: int
    hidden_size: int
    vocab_size: int
    repetitions: int

    def config(self) -> Config:
        """A run's configuration with this model; its data is never opened."""
        return Config.model_validate(
            {
                "model": {
                    "num_layers": self.layers,
                    "hidden_size": self.hidden_size,
                    "ffn_hidden_size": self.hidden_size * 11 // 4,
                    "num_attention_heads": self.hidden_size // 64,
                    "num_query_groups": 1,
                    "max_position_embeddings": 512,
                },
                "data": {"tokenizer": "none", "train": [{"prefix": "none"}]},
                "curriculum": [{"seq_length": 512, "steps": 1}],
                "batch": {"global_size": 1},
            }
        )


FULL = CheckpointWork(layers=24, hidden_size=1024, vocab_size=32_768, repetitions=3)
QUICK = CheckpointWork(layers=2, hidden_size=64, vocab_size=512, repetitions=2)
"""Takes seconds rather than minutes: shows that everything runs; its figures mean nothing."""


@dataclass(frozen=True)
class SaveFigures:
    """A way of saving, in seconds.

    Attributes:
        save_seconds: until the checkpoint is complete on disk; the minimum.
        median_save_seconds: the median.
        blocked_seconds: for which training stands still; the minimum.
        median_blocked_seconds: the median.
        first_blocked_seconds: of the first save, which allocates memory if in the background.
    """

    save_seconds: float
    median_save_seconds: float
    blocked_seconds: float
    median_blocked_seconds: float
    first_blocked_seconds: float


@dataclass(frozen=True)
class StateFigures:
    """What was measured in the separate process.

    Attributes:
        parameters: of the model.
        bytes: of the checkpoint's files, without the manifest.
        files: number of these files.
        synchronous: saves that training waits for.
        asynchronous: saves in the background (`checkpoint.async`); nothing else runs meanwhile.
        load_seconds: finding, verifying and loading a checkpoint; the minimum.
        median_load_seconds: the median.
    """

    parameters: int
    bytes: int
    files: int
    synchronous: SaveFigures
    asynchronous: SaveFigures
    load_seconds: float
    median_load_seconds: float


@dataclass(frozen=True)
class CheckpointFigures:
    """The figures, and what they were measured on."""

    hardware: Hardware
    versions: dict[str, str]
    quick: bool
    state: StateFigures

    def document(self) -> dict[str, Any]:
        """The figures for JSON: the state's are inlined, and the two most useful ones repeated."""
        fields = asdict(self)
        state = fields.pop("state")
        return {
            **fields,
            "save_seconds": self.state.synchronous.save_seconds,
            "blocked_seconds": self.state.asynchronous.blocked_seconds,
            **state,
        }


def measure_checkpoint(work: CheckpointWork, say: Callable[[str], None]) -> CheckpointFigures:
    """Save and load the training state of a model, in a temporary folder of two checkpoints.

    Args:
        work: the model.
        say: called with what is being measured.

    Raises:
        DataError: the disk or the memory is too small.
    """
    hardware, versions = describe_hardware(), describe_versions()
    say("saving and loading checkpoints")
    try:
        with tempfile.TemporaryDirectory(prefix="megatron_bert_benchmark_") as folder:
            state = run_isolated(measure_state, work, Path(folder) / "saved")
    except (OSError, CheckpointError) as error:
        raise DataError(
            f"cannot write checkpoints ({error}); set TMPDIR to a folder on a larger disk"
        ) from error
    return CheckpointFigures(hardware, versions, work is QUICK, state)


def measure_state(work: CheckpointWork, root: Path) -> StateFigures:
    """Measure in this process, which should be new and becomes a job of one rank."""
    device = torch.device("cpu")
    keep_freed_memory()
    with process_group(device, _TIMEOUT_SECONDS):
        config, topology = work.config(), Topology.build(device)
        model = build_model(config, work.vocab_size, topology)
        optimizer = build_optimizer(config, model)
        tensors = state_tensors(model, optimizer)
        # Moments begin as zeros without memory of their own; fill them, so that they have it.
        for moment in optimizer.state_tensors().values():
            local_part(moment).uniform_()
        store = CheckpointStore(root, keep=1, group=new_host_group(_TIMEOUT_SECONDS))
        synchronous, asynchronous = _time_saves(store, tensors, work.repetitions)
        path = store.newest()
        assert path is not None
        sizes = [record.size for record in Manifest.read(path).files.values()]
        loads = Timing(tuple(_time_load(store, path, tensors) for _ in range(work.repetitions)))
        parameters = sum(parameter.numel() for parameter in model.named_parameters().values())
    return StateFigures(
        parameters=parameters,
        bytes=sum(sizes),
        files=len(sizes),
        synchronous=synchronous,
        asynchronous=asynchronous,
        load_seconds=round(loads.best, 3),
        median_load_seconds=round(loads.median, 3),
    )


def _time_saves(
    store: CheckpointStore, tensors: dict[str, torch.Tensor], repetitions: int
) -> list[SaveFigures]:
    """Save synchronously and in the background, in turns."""
    savers = [CheckpointSaver(store, in_background=way, max_failures=1) for way in (False, True)]
    saves: list[list[float]] = [[] for _ in savers]
    blocks: list[list[float]] = [[] for _ in savers]
    for step in range(repetitions + 1):
        for saver, saved, blocked in zip(savers, saves, blocks, strict=True):
            begin = time.perf_counter()
            saver.save(step, tensors, {"step": step})
            blocked.append(time.perf_counter() - begin)
            saver.finish()
            saved.append(time.perf_counter() - begin)
    return [_figures(*seconds) for seconds in zip(saves, blocks, strict=True)]


def _figures(saves: list[float], blocks: list[float]) -> SaveFigures:
    """Figures of all saves but the first."""
    saved, blocked = Timing(tuple(saves[1:])), Timing(tuple(blocks[1:]))
    return SaveFigures(
        save_seconds=round(saved.best, 3),
        median_save_seconds=round(saved.median, 3),
        blocked_seconds=round(blocked.best, 3),
        median_blocked_seconds=round(blocked.median, 3),
        first_blocked_seconds=round(blocks[0], 3),
    )


def _time_load(store: CheckpointStore, path: Path, tensors: dict[str, torch.Tensor]) -> float:
    """Find, verify and load, as a resuming job does; the files are first evicted from the cache."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    begin = time.perf_counter()
    newest = store.newest()
    assert newest == path
    store.load(newest, tensors)
    return time.perf_counter() - begin
