"""The same losses, gradient norms and rows whatever the ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.config.schema import Config
from megatron_bert.data.indexed_dataset import open_dataset
from tests.core.support import write_documents
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train


def _train(config: Config) -> list[dict[str, Any]]:
    return train(config)


Alone = Callable[..., dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def lines_of_one_rank() -> dict[str, dict[int, dict[str, Any]]]:
    """What runs of one rank came to, by what they changed."""
    return {}


@pytest.fixture
def alone(
    tiny_run: Callable[..., Config], lines_of_one_rank: dict[str, dict[int, dict[str, Any]]]
) -> Alone:
    """Trains on one rank, with some keys changed; those that did are not done again."""

    def train_alone(**changes: Any) -> dict[int, dict[str, Any]]:
        key = repr(changes)
        if key not in lines_of_one_rank:
            lines = run_ranks(1, _train, tiny_run("alone", **changes))[0]
            lines_of_one_rank[key] = steps_of(lines)
        return lines_of_one_rank[key]

    return train_alone


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"batch": {"micro_size": 5}}),
        (1, {"batch": {"micro_size": 12}}),
        (2, {}),
        (3, {}),
        (4, {"batch": {"micro_size": 2}}),
        (2, {"parallel": {"tensor": 2}}),
        (4, {"parallel": {"tensor": 2}}),
        (4, {"parallel": {"tensor": 4}}),
        (2, {"parallel": {"tensor": 2}, "model": {"num_query_groups": 2}}),
        (4, {"parallel": {"tensor": 4}, "model": {"num_query_groups": 2}}),
        (4, {"parallel": {"pipeline": 2, "tensor": 2, "sequence": True}}),
        (
            2,
            {
                "parallel": {"pipeline": 2, "pipeline_schedule": "interleaved"},
                "model": {"num_layers": 4},
            },
        ),
        (4, {"parallel": {"tensor": 2}, "optimizer": {"name": "muon"}}),
        (4, {"parallel": {"pipeline": 2}, "optimizer": {"name": "muon"}}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_every_topology_trains_alike_dropout_included(
    tiny_run: Callable[..., Config], alone: Alone, world_size: int, changes: dict[str, Any]
) -> None:
    expected = alone(**{key: changes.get(key, {}) for key in ("model", "optimizer")})
    found = steps_of(run_ranks(world_size, _train, tiny_run("many", **changes))[0])
    assert list(found) == list(expected)
    for step, line in found.items():
        assert line["batch_hash"] == expected[step]["batch_hash"]
        assert line["masked_tokens"] == expected[step]["masked_tokens"]
        # Rounding differences of the first steps grow with each update.
        tolerance = 1e-6 if step <= 3 else 1e-4
        assert line["loss"] == pytest.approx(expected[step]["loss"], rel=tolerance), step
        assert line["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=10 * tolerance)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {}), (4, {"replicate": 2}), (4, {"pipeline": 2, "pipeline_schedule": "zero_bubble"})],
    ids=str,
)
def test_gradients_reduced_in_bf16_stay_within_its_rounding(
    tiny_run: Callable[..., Config], alone: Alone, world_size: int, parallel: dict[str, Any]
) -> None:
    model = {"num_layers": 4}
    bf16 = {"precision": {"reduce": "bf16"}, "parallel": parallel}
    exact = alone(model=model, optimizer={})
    found = steps_of(run_ranks(world_size, _train, tiny_run("bf16", model=model, **bf16))[0])
    assert any(line["loss"] != exact[step]["loss"] for step, line in found.items())
    for step, line in found.items():
        assert line["loss"] == pytest.approx(exact[step]["loss"], rel=2e-3), step


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {}), (3, {}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2})],
    ids=str,
)
def test_bf16_stays_within_its_rounding(
    tiny_run: Callable[..., Config], alone: Alone, world_size: int, parallel: dict[str, Any]
) -> None:
    bf16 = {"precision": {"compute": "bf16"}, "parallel": parallel}
    exact = alone(model={}, optimizer={})
    found = steps_of(run_ranks(world_size, _train, tiny_run("bf16", **bf16))[0])
    for step, line in found.items():
        assert line["loss"] == pytest.approx(exact[step]["loss"], rel=2e-3), step


def test_the_model_learns(tiny_run: Callable[..., Config]) -> None:
    longer = [{"seq_length": 32, "steps": 60}, {"seq_length": 64, "steps": 20}]
    config = tiny_run(curriculum=longer, eval={"interval": 80, "batches": 16})
    lines = run_ranks(1, _train, config)[0]
    losses = [line["loss"] for line in steps_of(lines).values()]
    evaluation = next(line for line in lines if "valid_loss" in line)
    assert losses[0] > 6.0 > 4.5 > losses[-1]
    assert evaluation["valid_loss"] < 4.5
    # Better than always naming the most frequent token.
    dataset = open_dataset(config.data.valid[0].prefix)
    tokens = np.concatenate([dataset.document(i) for i in range(dataset.num_documents)])
    assert evaluation["valid_accuracy"] > np.bincount(tokens).max() / len(tokens)
    assert evaluation["valid"]["valid"]["loss"] == evaluation["valid_loss"]


@pytest.mark.slow
def test_the_model_learns_what_only_context_tells(
    tiny_data: Path, tiny_run: Callable[..., Config]
) -> None:
    # Every document counts up from a random start: each id is as frequent as any other, so a
    # model that looks at no context stays at log(40) = 3.7 nats.
    starts = np.random.default_rng(3).integers(0, 40, 400)
    documents = [300 + (start + np.arange(30)) % 40 for start in starts]
    write_documents(tiny_data / "counting", documents, 2)
    config = tiny_run(
        data={"train": [{"prefix": str(tiny_data / "counting")}]},
        curriculum=[{"seq_length": 32, "steps": 300}],
        mlm={"unit": "token"},
        model={"init_std": 0.15, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        optimizer={"lr": 3e-3, "eps": 1e-8},
        valid=False,
    )
    lines = steps_of(run_ranks(1, _train, config)[0])
    assert lines[1]["loss"] > 6.0
    assert sum(lines[step]["loss"] for step in range(281, 301)) / 20 < 3.4
