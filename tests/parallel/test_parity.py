"""Every layout trains as one process does: losses, rows, norms, gradients and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.distributed_harness import run_ranks
from tests.parallel.parity import STEPS, Trace, assembled, parity_config, traces_of

# (pipeline, data, tensor)
LAYOUTS = [
    (p, d, t) for p in range(1, 5) for d in range(1, 5) for t in range(1, 5) if p * d * t <= 4
]
# Relative, of fp32: losses; everything else.
LOSS_BOUND, BOUND = 1e-6, 1e-5
MODERNBERT = {
    "architecture": "modernbert",
    "num_layers": 4,
    "num_query_groups": 12,
    # The rows' segments are longer.
    "local_attention": 8,
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@dataclass(frozen=True)
class Reference:
    """What one process made of it."""

    trace: Trace
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def reference(tiny_data: Path) -> Callable[..., Reference]:
    """One process's run of a model, made once."""
    made: dict[str, Reference] = {}

    def of(model: dict[str, Any], **changes: Any) -> Reference:
        what = str((model, changes))
        if what not in made:
            config = parity_config(tiny_data, model=model, **changes)
            ((trace,),) = run_ranks(1, traces_of, [config])
            gradients = [assembled([parts]) for parts in trace.gradients]
            made[what] = Reference(trace, gradients, assembled([trace.weights]))
        return made[what]

    return of


def _variants(pipeline: int, data: int, tensor: int) -> Iterator[dict[str, Any]]:
    """Every way to run a layout: sequence parallelism, schedule, recomputation, dropout."""
    # Two stages a rank where they interleave need a block each.
    model = {"num_layers": max(4, 2 * pipeline)}
    schedules = ["1f1b", "interleaved", "zero_bubble"] if pipeline > 1 else ["1f1b"]
    for dropout in ({}, DROPOUT):
        for sequence in [False, True] if tensor > 1 else [False]:
            for schedule in schedules:
                for recompute in ["none", "full"] if schedule != "zero_bubble" else ["none"]:
                    yield {
                        "model": model | dropout,
                        "parallel": {
                            "pipeline": pipeline,
                            "tensor": tensor,
                            "sequence": sequence,
                            "pipeline_schedule": schedule,
                        },
                        "recompute": recompute,
                    }
    parallel = {"pipeline": pipeline, "tensor": tensor}
    yield {"model": model | DROPOUT, "parallel": parallel, "recompute": "selective"}
    if data > 1:
        yield {"model": model, "parallel": {**parallel, "reshard_after_forward": True}}
    if data % 2 == 0:
        yield {"model": model | DROPOUT, "parallel": {**parallel, "replicate": 2}}


def _with_everything(pipeline: int, data: int, tensor: int) -> Iterator[dict[str, Any]]:
    """Three ways in which each kind of parallelism and recomputation occurs, for every day."""
    model = {"num_layers": max(4, 2 * pipeline)}
    sizes = {"pipeline": pipeline, "tensor": tensor}
    yield {"model": model, "parallel": {**sizes, "pipeline_schedule": "zero_bubble"}}
    yield {
        "model": model | DROPOUT,
        "parallel": {**sizes, "reshard_after_forward": data > 1},
        "recompute": "selective",
    }
    yield {
        "model": model | DROPOUT,
        "parallel": {
            **sizes,
            "sequence": True,
            "pipeline_schedule": "interleaved",
            "replicate": 2 if data % 2 == 0 else 1,
        },
        "recompute": "full",
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "pp{}-dp{}-tp{}".format(*layout))
@pytest.mark.parametrize(
    "variants", [_with_everything, pytest.param(_variants, marks=pytest.mark.slow)]
)
def test_every_layout_trains_as_one_process_does(
    tiny_data: Path,
    reference: Callable[[dict[str, Any]], Reference],
    layout: tuple[int, int, int],
    variants: Callable[[int, int, int], Iterator[dict[str, Any]]],
) -> None:
    pipeline, data, tensor = layout
    changes = list(variants(*layout))
    configs = [parity_config(tiny_data, **change) for change in changes]
    by_rank = run_ranks(pipeline * data * tensor, traces_of, configs)
    for change, traces in zip(changes, zip(*by_rank, strict=True), strict=True):
        _compare(list(traces), reference(change["model"]), str(change))


# (ranks, parallel)
MUON = [
    (2, {}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2, "pipeline_schedule": "zero_bubble"}),
    (3, {}),
    (4, {"tensor": 2, "sequence": True, "reshard_after_forward": True}),
    (4, {"tensor": 2, "pipeline": 2}),
    (4, {"replicate": 2}),
    (4, {"tensor": 4}),
    pytest.param(8, {"tensor": 2, "replicate": 2}, marks=pytest.mark.slow),
    pytest.param(8, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "parallel"), MUON, ids=str)
def test_muon_s_updates_are_those_of_one_process(
    tiny_data: Path, reference: Callable[..., Reference], ranks: int, parallel: dict[str, Any]
) -> None:
    # Key and value heads of their own: matrices that are split, and with 4 ranks such as are not.
    changes: dict[str, Any] = {
        "model": {"num_layers": 4, "num_query_groups": 2} | DROPOUT,
        "optimizer": {"name": "muon"},
    }
    config = parity_config(tiny_data, **changes, parallel=parallel)
    traces = [trace for (trace,) in run_ranks(ranks, traces_of, [config])]
    _compare(traces, reference(**changes), str(parallel))


# What goes wrong only where shards are uneven in two ways, or where everything comes together.
LARGER: list[tuple[int, dict[str, Any]]] = [
    (6, {"tensor": 2, "sequence": True, "reshard_after_forward": True}),
    (6, {"pipeline": 2, "pipeline_schedule": "zero_bubble"}),
    (8, {"tensor": 2, "sequence": True, "replicate": 2, "reshard_after_forward": True}),
    (8, {"pipeline": 2, "tensor": 2, "sequence": True, "pipeline_schedule": "interleaved"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), LARGER, ids=str)
def test_six_and_eight_ranks_train_as_one_does(
    tiny_data: Path,
    reference: Callable[[dict[str, Any]], Reference],
    ranks: int,
    parallel: dict[str, Any],
) -> None:
    model = {"num_layers": 4} | DROPOUT
    config = parity_config(tiny_data, model=model, parallel=parallel)
    traces = [trace for (trace,) in run_ranks(ranks, traces_of, [config])]
    _compare(traces, reference(model), str(parallel))


@pytest.mark.slow
def test_twelve_data_parallel_ranks_share_a_batch_that_they_do_not_divide(
    tiny_data: Path,
) -> None:
    changes: dict[str, Any] = {"model": {"num_layers": 2}, "batch": {"global_size": 20}}
    config = parity_config(tiny_data, **changes)
    ((one,),) = run_ranks(1, traces_of, [config])
    many = [trace for (trace,) in run_ranks(12, traces_of, [config])]
    expected = Reference(one, [assembled([p]) for p in one.gradients], assembled([one.weights]))
    _compare(many, expected, "12 ranks, 20 rows")


@pytest.mark.slow
def test_24_heads_and_one_key_value_head_over_8_ranks(
    tiny_data: Path, reference: Callable[[dict[str, Any]], Reference]
) -> None:
    model = {"num_layers": 2, "num_attention_heads": 24}
    config = parity_config(tiny_data, model=model, parallel={"tensor": 8, "sequence": True})
    traces = [trace for (trace,) in run_ranks(8, traces_of, [config])]
    _compare(traces, reference(model), "8 tensor-parallel ranks")


@pytest.mark.parametrize(
    ("ranks", "parallel", "recompute"),
    [
        (2, {"pipeline": 2, "pipeline_schedule": "zero_bubble"}, "none"),
        (3, {"tensor": 3}, "selective"),
        (
            4,
            {
                "pipeline": 2,
                "tensor": 2,
                "sequence": True,
                "pipeline_schedule": "interleaved",
            },
            "full",
        ),
    ],
    ids=["pipeline", "tensor", "all"],
)
def test_modernbert_trains_as_one_process_does(
    tiny_data: Path,
    reference: Callable[[dict[str, Any]], Reference],
    ranks: int,
    parallel: dict[str, Any],
    recompute: str,
) -> None:
    model = MODERNBERT | DROPOUT
    config = parity_config(tiny_data, model=model, parallel=parallel, recompute=recompute)
    traces = [trace for (trace,) in run_ranks(ranks, traces_of, [config])]
    _compare(traces, reference(model), str(parallel))


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("tensor", [2, 3, 4])
def test_key_and_value_heads_are_shared_out_or_held_by_all(
    tiny_data: Path,
    reference: Callable[[dict[str, Any]], Reference],
    groups: int,
    tensor: int,
) -> None:
    model = {"num_layers": 2, "num_query_groups": groups}
    parallel = {"tensor": tensor, "sequence": tensor == 4}
    config = parity_config(tiny_data, model=model, parallel=parallel)
    traces = [trace for (trace,) in run_ranks(tensor, traces_of, [config])]
    _compare(traces, reference(model), f"{groups} groups over {tensor} ranks")


def _compare(traces: list[Trace], expected: Reference, what: str) -> None:
    for trace in traces:
        assert trace.batch_hashes == expected.trace.batch_hashes, what
        assert trace.losses == pytest.approx(expected.trace.losses, rel=LOSS_BOUND), what
        assert trace.grad_norms == pytest.approx(expected.trace.grad_norms, rel=BOUND), what
    for step in range(STEPS):
        gradients = assembled([trace.gradients[step] for trace in traces])
        norm = expected.trace.grad_norms[step]
        _compare_tensors(gradients, expected.gradients[step], norm, f"{what}, step {step + 1}")
    weights = assembled([trace.weights for trace in traces])
    norm = sum(float(w.norm()) ** 2 for w in expected.weights.values()) ** 0.5
    _compare_tensors(weights, expected.weights, norm, f"{what}, weights")


def _compare_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], global_norm: float, what: str
) -> None:
    assert found.keys() == expected.keys(), what
    for name, tensor in expected.items():
        # The softmax does not see a shift of all scores: a key bias has no true gradient.
        norm = global_norm if name.endswith("key.bias") else float(tensor.norm())
        difference = float((found[name] - tensor).norm())
        assert difference <= BOUND * norm, f"{what}: {name} is off by {difference / norm:.1e}"
