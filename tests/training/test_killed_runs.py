"""A run of which a rank gets a kill -9, at moments drawn by chance, is the uncut run to the bit."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.schema import Config
from tests.distributed_harness import PEER_GONE, RankError, run_ranks
from tests.training.moments import Moment, Row, counted, drawn
from tests.training.runs import run_config, steps_of, train

RANKS = 2
STEPS = 8
DAILY = 3
SEEDS = [*range(DAILY), *(pytest.param(n, marks=pytest.mark.faults) for n in range(DAILY, 20))]
EXACT = ("loss", "grad_norm", "lr", "batch_hash", "consumed_rows", "tokens")


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its lines without the clock's, and a hash of its last checkpoint."""

    lines: list[tuple[Any, ...]]
    state_hash: str


@dataclass(frozen=True)
class Uncut:
    """A run that nothing interrupted, and how many moments each rank went through."""

    outcome: Outcome
    moments: list[Counter[Row]]


def _configure(data: Path, run_dir: Path, seed: int) -> Config:
    """Eight steps over two lengths and into a second epoch; every other run saves beside them."""
    return run_config(
        data,
        run_dir,
        model={"num_layers": 1},
        curriculum=[{"seq_length": 32, "steps": 5}, {"seq_length": 64, "steps": STEPS - 5}],
        batch={"global_size": 12, "micro_size": 6},
        checkpoint={"interval": 2, "keep": 2, "async": bool(seed % 2)},
        eval={"interval": 4, "batches": 1},
    )


def _train(config: Config, moment: Moment | None) -> tuple[list[dict[str, Any]], Counter[Row]]:
    own = moment if moment is not None and moment.rank == dist.get_rank() else None
    with counted(own) as counts:
        return train(config), counts


def _outcome(config: Config, lines: list[dict[str, Any]]) -> Outcome:
    facts = [tuple(line[key] for key in EXACT) for line in steps_of(lines).values()]
    facts += [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    newest = CheckpointStore(config.run.directory / "checkpoints", keep=1).newest()
    assert newest is not None
    assert newest.name == f"step_{STEPS:08d}"
    digest = hashlib.sha256()
    for shard in sorted(newest.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    return Outcome(facts, digest.hexdigest())


@pytest.fixture(scope="module")
def uncut(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Uncut:
    config = _configure(tiny_data, tmp_path_factory.mktemp("uncut") / "run", 0)
    results = run_ranks(RANKS, _train, config, None)
    return Uncut(_outcome(config, results[0][0]), [counts for _, counts in results])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_killed_at_any_moment_costs_no_bit(
    uncut: Uncut, tiny_data: Path, tmp_path: Path, seed: int
) -> None:
    config = _configure(tiny_data, tmp_path / "run", seed)
    moment = drawn(seed, uncut.moments)
    # The other rank may be heard first.
    with pytest.raises(RankError, match=rf"exit code -9|{PEER_GONE}"):
        run_ranks(RANKS, _train, config, moment)
    lines, _ = run_ranks(RANKS, _train, config, None)[0]
    assert _outcome(config, lines) == uncut.outcome, moment
