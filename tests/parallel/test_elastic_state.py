"""A checkpoint of any layout goes on under any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bert.checkpoint.manifest import JSON
from megatron_bert.checkpoint.run_state import trained_state
from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.checkpoint.tensors import read_whole_tensors, saved_shapes
from megatron_bert.config.schema import Config
from megatron_bert.optim.sharded import ShardedOptimizer
from megatron_bert.training.state import load_state, save_state
from tests.distributed_harness import run_ranks
from tests.parallel.parity import build, parity_config, take_steps
from tests.parallel.test_parity import LAYOUTS

# (pipeline, data, tensor), and what else a layout may have.
Layout = tuple[int, int, int, dict[str, Any]]
_INTERLEAVED = {"pipeline_schedule": "interleaved"}
QUICK: list[Layout] = [
    (1, 3, 1, {}),
    (2, 1, 2, {"sequence": True, "pipeline_schedule": "zero_bubble"}),
    (4, 1, 1, _INTERLEAVED),
    (1, 4, 1, {"replicate": 2}),
]
ALL: list[Layout] = [(*sizes, {}) for sizes in LAYOUTS] + QUICK[1:2]
SAVED_AFTER = 2


def _config(data: Path, layout: Layout, name: str = "adamw") -> Config:
    pipeline, _, tensor, others = layout
    return parity_config(
        data,
        model={"num_layers": 8, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        parallel={"pipeline": pipeline, "tensor": tensor, **others},
        # Micro-batches and recomputation may change too.
        batch={"micro_size": 2 + pipeline},
        optimizer={"name": name},
        recompute="full" if tensor > 1 and "pipeline_schedule" not in others else "none",
    )


def _state(optimizer: ShardedOptimizer) -> dict[str, JSON]:
    return trained_state(
        step=SAVED_AFTER,
        consumed_rows=0,
        optimizer=optimizer.name,
        optimizer_updates=optimizer.updates,
        config={},
        tokenizer_hash="",
        data=[],
        topology={},
    )


def _save(data: Path, layout: Layout, folder: Path, name: str = "adamw") -> None:
    config = _config(data, layout, name)
    model, optimizer = build(config)
    take_steps(config, model, optimizer, range(1, SAVED_AFTER + 1))
    saver = CheckpointSaver(CheckpointStore(folder, keep=1), in_background=False, max_failures=1)
    save_state(saver, SAVED_AFTER, model, optimizer, _state(optimizer), is_last=True)


def _go_on(data: Path, layout: Layout, folders: Sequence[Path]) -> list[tuple[float, float, int]]:
    """Load each checkpoint in turn and take the next step: loss, norm and rows of it."""
    config = _config(data, layout)
    model, optimizer = build(config)
    steps = []
    for folder in folders:
        store = CheckpointStore(folder, keep=1)
        path = store.newest()
        assert path is not None
        load_state(store, path, model, optimizer)
        trace = take_steps(config, model, optimizer, range(SAVED_AFTER + 1, SAVED_AFTER + 2))
        steps.append((trace.losses[0], trace.grad_norms[0], trace.batch_hashes[0]))
    return steps


def _check(data: Path, folder: Path, layouts: Sequence[Layout]) -> None:
    folders = []
    for number, layout in enumerate(layouts):
        folders.append(folder / str(number))
        run_ranks(_ranks(layout), _save, data, layout, folders[-1])
    whole = run_ranks(1, _go_on, data, (1, 1, 1, {}), folders[:1])[0][0]
    for layout in layouts:
        found = run_ranks(_ranks(layout), _go_on, data, layout, folders)[0]
        for saved_by, (loss, norm, rows) in zip(layouts, found, strict=True):
            what = f"{saved_by} goes on as {layout}"
            assert rows == whole[2], what
            assert loss == pytest.approx(whole[0], rel=1e-6), what
            assert norm == pytest.approx(whole[1], rel=1e-5), what


def _ranks(layout: Layout) -> int:
    return layout[0] * layout[1] * layout[2]


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_another_layout(tiny_data: Path, tmp_path: Path) -> None:
    _check(tiny_data, tmp_path, QUICK)


def _load_and_save(data: Path, layout: Layout, source: Path, target: Path, name: str) -> None:
    config = _config(data, layout, name)
    model, optimizer = build(config)
    store = CheckpointStore(source, keep=1)
    path = store.newest()
    assert path is not None
    load_state(store, path, model, optimizer)
    saver = CheckpointSaver(CheckpointStore(target, keep=1), in_background=False, max_failures=1)
    save_state(saver, SAVED_AFTER, model, optimizer, _state(optimizer), is_last=True)


def _content(folder: Path) -> list[tuple[str, torch.Tensor]]:
    path = CheckpointStore(folder, keep=1).newest()
    assert path is not None
    shapes = dict(sorted(saved_shapes(path).items()))
    return list(zip(shapes, read_whole_tensors(path, shapes), strict=True))


@pytest.mark.slow
def test_every_layout_gives_on_the_bits_that_another_gave_it(
    tiny_data: Path, tmp_path: Path
) -> None:
    _pass_on(tiny_data, tmp_path, ALL[-1], ALL, "adamw")


@pytest.mark.slow
def test_muon_s_momentum_goes_from_layout_to_layout_to_the_bit(
    tiny_data: Path, tmp_path: Path
) -> None:
    names = _pass_on(tiny_data, tmp_path, (1, 2, 2, {}), [*QUICK, (1, 1, 1, {})], "muon")
    block = "optim.blocks.7.attention.query"
    assert {name for name in names if name.startswith(block)} == {
        f"{block}.weight.momentum",
        f"{block}.bias.exp_avg",
        f"{block}.bias.exp_avg_sq",
    }


def _pass_on(
    data: Path, root: Path, first: Layout, layouts: Sequence[Layout], name: str
) -> list[str]:
    """One checkpoint goes through all layouts in turn; returns its tensors' names.

    Loading and saving are exact in each, so any one goes on from any other's checkpoint.
    """
    folder = root / "0"
    run_ranks(_ranks(first), _save, data, first, folder, name)
    content = _content(folder)
    assert any(key.startswith("optim.") and tensor.any() for key, tensor in content)
    for number, layout in enumerate(layouts, start=1):
        source, folder = folder, root / str(number)
        work = (_load_and_save, data, layout, source, folder, name)
        run_ranks(_ranks(layout), *work)
        for (key, tensor), (other, given) in zip(content, _content(folder), strict=True):
            assert key == other
            assert torch.equal(tensor, given), f"{layout}: {key}"
    return [key for key, _ in content]


@pytest.mark.slow
def test_eight_ranks_go_on_from_one_and_one_from_eight(tiny_data: Path, tmp_path: Path) -> None:
    eight: Layout = (2, 2, 2, {"sequence": True, "pipeline_schedule": "interleaved"})
    _check(tiny_data, tmp_path, [(1, 1, 1, {}), eight])
